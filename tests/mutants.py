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
    "capture": "capture carrier graphs",
    "carrier": "carrier capture torchscript hazards safety weight_norm model spectral_norm",
    "functional": "functional middle_dim numerics properties dims autograd spectral_norm",
    "middle_dim": "middle_dim functional numerics",
    "model": "model model_examples bad_input",
    "spectral_norm": "spectral_norm bad_input properties numerics",
    "spellings": "spellings model",
    "table": "teaching model",
    "steps": "teaching",
    "stale": "teaching",
    "initialization": "teaching",
    "straight": "straight carrier hazards threads",
    "store": "carrier threads",
    "undo": "faults model",
    "torchscript": "torchscript without_torchscript weight_norm spectral_norm",
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


def is_noticed(project: Path, module: str) -> bool:
    """Whether a test about `module` fails."""
    files = [f"tests/test_{name}.py" for name in TESTS.get(module, ABOUT_ALL).split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    for choice in (["-k", COMPILES_NOTHING], []):
        try:
            run = subprocess.run([*command, *choice], cwd=project, env=environment, capture_output=True, timeout=1200)
        except subprocess.TimeoutExpired:  # a loop without end is noticed too
            return True
        if run.returncode not in (0, 5):
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="of the package, without .py; else all of them")
    parser.add_argument("--sample", type=int, help="how many mutants, chosen by chance; else all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where each result is added, as a line of JSON")
    chosen = parser.parse_args()

    paths = [
        path for path in sorted((ROOT / "explicit_wn").rglob("*.py")) if path.stem in (chosen.modules or [path.stem])
    ]
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
            noticed = is_noticed(project, path.stem)
            copy.write_text(path.read_text())
            score[noticed] += 1
            result = {"module": path.stem, "line": line, "operator": operator, "before": before, "after": after}
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps({**result, "noticed": noticed}) + "\n")
            if not noticed:
                print(f"{path.name}:{line}\n    {before}\n    {after}", flush=True)
    print(f"{score[True]} of {score.total()} mutants were noticed.")


if __name__ == "__main__":
    main()
