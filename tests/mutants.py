"""Mutation testing: breaks the package in one place after the other, and sees whether a test notices.

    pip install cosmic-ray
    python tests/mutants.py [--sample 100] [--seed 0] [--out survivors.jsonl] [MODULE ...]

It works on a copy of the project, with the mutations of cosmic-ray, and runs the tests that are about the module: first
those that compile nothing, then all of them. A mutant takes seconds, a survivor a minute or two. Every survivor is to
be read: either it means the same as the original, or a test is missing.
"""

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

COMPARISONS = [("Eq", "NotEq"), ("Is", "IsNot"), ("Lt", "LtE"), ("Lt", "GtE"), ("Gt", "GtE"), ("Gt", "LtE")]
OPERATORS = [
    *("AddNot", "NumberReplacer", "ZeroIterationForLoop", "ExceptionReplacer", "RemoveDecorator"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceFalseWithTrue", "ReplaceTrueWithFalse"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ReplaceUnaryOperator_Delete_Not"),
    *("ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add"),
    *("ReplaceBinaryOperator_Mul_Div", "ReplaceBinaryOperator_Div_Mul"),
    *(f"ReplaceComparisonOperator_{a}_{b}" for pair in COMPARISONS for a, b in (pair, pair[::-1])),
]

ABOUT_ALL = "weight_norm reparametrization bad_input properties numerics safety composition"
TESTS = {
    "caller": "alarm",
    "carrier/alarm": "alarm stale checking",
    "carrier/inlined": "carrier rooms threads alarm straight capture",
    "carrier/loading": "carrier safety weight_norm spectral_norm",
    "carrier/module": "carrier alarm capture torchscript hazards safety weight_norm verbs fold spectral_norm",
    "carrier/recipe": "carrier safety reparametrization spectral_norm",
    "carrier/store": "carrier threads alarm",
    "carrier/straight": "straight carrier hazards threads",
    "carrier/undo": "faults verbs fold",
    "carrier/weight": "straight alarm carrier capture hazards threads composition distributed",
    "checkpoint/command": "command",
    "checkpoint/files": "files command",
    "checkpoint/format": "files command",
    "checkpoint/shards": "files command",
    "checkpoint/spellings": "state files",
    "checkpoint/state": "state files",
    "contexts/capture": "capture alarm carrier graphs rooms",
    "contexts/torchscript": "torchscript without_torchscript weight_norm spectral_norm",
    "folded": "author other_norms fold",
    "functional/middle_dim": "middle_dim functional numerics",
    "functional/shapes": "functional other_norms hazards capture",
    "functional/slices": "other_norms functional",
    "functional/spectral": "spectral_norm functional",
    "functional/weight": "functional middle_dim numerics properties dims autograd",
    "models/checking": "checking",
    "models/conversion": "fold report model_examples bad_input spellings",
    "models/dropin": "dropin bad_input",
    "models/from_r": "load_r",
    "models/initializing": "initializing",
    "models/reporting": "report spellings checking",
    "models/spellings": "spellings fold report",
    "models/verbs": "verbs model_examples bad_input threads",
    "norms/forced_weight_norm": "other_norms",
    "norms/scaled_weight_norm": "other_norms",
    "norms/sigma_reparam": "other_norms",
    "norms/spectral_norm": "spectral_norm bad_input properties numerics",
    "norms/unit_norm": "other_norms",
    "norms/weight_norm": "weight_norm numerics properties bad_input steps",
    "norms/weight_standardization": "other_norms",
    "protocol": "author reparametrization carrier other_norms",
    "refusals": "bad_input author reparametrization",
    "settings": "bad_input author other_norms",
    "table": "steps report",
    "teaching/data_dependent": "data_dependent",
    "teaching/record": "record",
    "teaching/stale": "stale",
    "teaching/steps": "steps",
    "written": "author",
}
COMPILES_NOTHING = "not compil and not export and not script and not trace and not process and not ddp"


def mutants(module: Path) -> list[tuple[str, int, str, str, str]]:
    """Operator, line, that line before and after, and the whole source after."""
    from cosmic_ray.mutating import MutationVisitor  # which the tests do without
    from cosmic_ray.plugins import get_operator

    source, found = module.read_text(), []
    for operator in OPERATORS:
        for occurrence in range(10_000):
            mutated = MutationVisitor.mutate_code(source, get_operator(f"core/{operator}")(), occurrence)
            if mutated is None:
                break
            lines = enumerate(zip(source.splitlines(), mutated.splitlines(), strict=False), 1)
            number, (before, after) = next((n, pair) for n, pair in lines if pair[0] != pair[1])
            if not before.lstrip().startswith(("#", ">>>")):
                found.append((operator, number, before.strip(), after.strip(), mutated))
    return found


def is_noticed(project: Path, module: str, quick: bool) -> bool:
    """Whether a test about `module` fails, or one of the quick ones."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    for name in [] if quick else TESTS.get(module, ABOUT_ALL).split():
        command += map(str, (project / "tests").rglob(f"test_{name}.py"))
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    for choice in [["-m", "quick"]] if quick else [["-k", COMPILES_NOTHING], []]:
        try:
            run = subprocess.run([*command, *choice], cwd=project, env=environment, capture_output=True, timeout=1200)
        except subprocess.TimeoutExpired:  # a loop without end is noticed too
            return True
        if run.returncode not in (0, 5):
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="carrier/weight, say; else all of them")
    parser.add_argument("--sample", type=int, help="how many mutants, chosen by chance; else all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where each result is added, as a line of JSON")
    parser.add_argument("--quick", action="store_true", help="only ask the tests that `pytest -m quick` runs")
    chosen = parser.parse_args()

    package = ROOT / "explicit_wn"
    modules = {str(path.relative_to(package).with_suffix("")): path for path in sorted(package.rglob("*.py"))}
    paths = [path for module, path in modules.items() if module in (chosen.modules or modules)]
    found = [(path, *mutant) for path in paths for mutant in mutants(path)]
    random.Random(chosen.seed).shuffle(found)
    found = found[: chosen.sample]
    score: collections.Counter[bool] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info"))
        for path, operator, line, before, after, mutated in found:
            copy = project / path.relative_to(ROOT)
            copy.write_text(mutated)
            module = str(path.relative_to(package).with_suffix(""))
            noticed = is_noticed(project, module, chosen.quick)
            copy.write_text(path.read_text())
            score[noticed] += 1
            result = {"module": module, "line": line, "operator": operator, "before": before, "after": after}
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps({**result, "noticed": noticed}) + "\n")
            if not noticed:
                print(f"{module}:{line}\n    {before}\n    {after}", flush=True)
    print(f"{score[True]} of {score.total()} mutants were noticed.")


if __name__ == "__main__":
    main()
