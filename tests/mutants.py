"""Mutation testing: breaks the package in one place after the other, and sees whether a test notices.

    pip install cosmic-ray
    python tests/mutants.py [--sample 100] [--jobs 2] [--out results.jsonl] [MODULE ...]

It works on copies of the project, with the mutations of cosmic-ray, and runs the tests that are about the module: the
quick ones first, then the others. A mutant takes seconds, a survivor minutes. Every survivor is to be read: either it
means the same as the original, or a test is missing.
"""

import argparse
import collections
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
    "carrier/inlined": "carrier rooms threads alarm straight capture record",
    "carrier/loading": "carrier safety weight_norm spectral_norm",
    "carrier/module": "carrier alarm capture torchscript hazards safety weight_norm verbs fold spectral_norm",
    "carrier/recipe": "carrier safety reparametrization spectral_norm composition",
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
    "contexts/capture": "capture alarm carrier graphs rooms other_norms",
    "contexts/torchscript": "torchscript without_torchscript weight_norm spectral_norm",
    "folded": "author other_norms fold",
    "functional/middle_dim": "middle_dim functional numerics",
    "functional/shapes": "functional other_norms hazards capture",
    "functional/slices": "other_norms functional",
    "functional/spectral": "spectral_norm functional other_norms",
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
    "asking": "bad_input reparametrization author",
    "protocol": "author reparametrization carrier other_norms",
    "refusals": "bad_input author reparametrization spectral_norm",
    "settings": "bad_input author other_norms",
    "table": "steps report",
    "teaching/data_dependent": "data_dependent",
    "teaching/record": "record",
    "teaching/stale": "stale",
    "teaching/steps": "steps",
    "mistakes": "author",
}


def mutants(module: Path) -> list[tuple[str, int, str, str, str]]:
    """Operator, line, that line before and after, and the whole source after."""
    from cosmic_ray.mutating import MutationVisitor  # which the tests do without
    from cosmic_ray.plugins import get_operator

    source, found = module.read_text(), []
    for operator in OPERATORS:
        for occurrence in range(10_000):
            try:
                mutated = MutationVisitor.mutate_code(source, get_operator(f"core/{operator}")(), occurrence)
            except AttributeError:  # cosmic-ray replaces no exception whose name has a dot
                continue
            if mutated is None:
                break
            lines = enumerate(zip(source.splitlines(), mutated.splitlines(), strict=False), 1)
            number, (before, after) = next((n, pair) for n, pair in lines if pair[0] != pair[1])
            if not before.lstrip().startswith(("#", ">>>")):
                found.append((operator, number, before.strip(), after.strip(), mutated))
    return found


def noticed_by(project: Path, module: str) -> str | None:
    """Which tests about `module` fail: one of the "quick" ones, one of the "other", or None."""
    files = [
        path for name in TESTS.get(module, ABOUT_ALL).split() for path in (project / "tests").rglob(f"test_{name}.py")
    ]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    for kind, choice in [("quick", "quick"), ("other", "not quick")]:
        try:
            run = subprocess.run(
                [*command, "-m", choice], cwd=project, env=environment, capture_output=True, timeout=1200
            )
        except subprocess.TimeoutExpired:  # a loop without end is noticed too
            return kind
        if run.returncode not in (0, 5):  # 5: no such test
            return kind
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="carrier/weight, say; else all of them")
    parser.add_argument("--sample", type=int, help="how many mutants, chosen by chance; else all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--out", type=Path, help="where each result is added, as a line of JSON")
    chosen = parser.parse_args()

    package = ROOT / "explicit_wn"
    modules = {str(path.relative_to(package).with_suffix("")): path for path in sorted(package.rglob("*.py"))}
    found = [
        (name, *mutant) for name in modules if name in (chosen.modules or modules) for mutant in mutants(modules[name])
    ]
    random.Random(chosen.seed).shuffle(found)
    score: collections.Counter[str | None] = collections.Counter()
    projects: queue.Queue[Path] = queue.Queue()

    def ask_the_tests(mutant: tuple[str, str, int, str, str, str]) -> None:
        module, operator, line, before, after, mutated = mutant
        project = projects.get()
        copy = project / "explicit_wn" / f"{module}.py"
        original = copy.read_text()
        copy.write_text(mutated)
        by = noticed_by(project, module)
        copy.write_text(original)
        projects.put(project)
        score[by] += 1
        result = {"module": module, "line": line, "operator": operator, "before": before, "after": after, "noticed": by}
        if chosen.out:
            with chosen.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
        if by is None:
            print(f"{module}:{line}\n    {before}\n    {after}", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(chosen.jobs) as pool:
        for number in range(chosen.jobs):
            projects.put(Path(folder, str(number)))
            ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info")
            shutil.copytree(ROOT, Path(folder, str(number)), ignore=ignored)
        list(pool.map(ask_the_tests, found[: chosen.sample]))
    noticed = score["quick"] + score["other"]
    print(f"{noticed} of {score.total()} mutants were noticed, {score['quick']} of them by a quick test.")


if __name__ == "__main__":
    main()
