"""Time the default training step of this checkout against that of another commit.

`python tools/against.py COMMIT [--json FILE]`. Both run in processes of their own, in alternating
rounds, with the environment that the command line sets before it loads torch. The result has the
form of `scaledreamer bench`: ratio of the medians, and the quartiles of the ratio per round."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from scaledreamer.bench.paired import quartiles

ROOT = Path(__file__).resolve().parent.parent
STEPS = """
import json
import sys
import time

try:
    from scaledreamer.commands.main import settle
except ImportError:  # the names of version 0.1.0
    from scaledreamer.commands.entry import settle
settle()
try:
    from scaledreamer.bench.paired import environment
    from scaledreamer.bench.step_speed import Steps, start
except ImportError:
    from scaledreamer.bench.pairs import environment
    from scaledreamer.bench.steps import Steps, start

step, times = Steps(start("cpu", False)), []
for _ in range(5 + int(sys.argv[1])):
    before = time.perf_counter()
    step()
    times.append(time.perf_counter() - before)
print(json.dumps({"times": times[5:], "environment": environment("cpu")}))
"""


def timed(checkout: Path, steps: int) -> dict:
    "Seconds of the steps of one process, and its environment."
    path = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(steps)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()]
        sys.exit(f"{checkout}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def commit_of(name: str) -> str | None:
    "Its short hash; None where this repository has no such commit."
    command = ["git", "rev-parse", "--short=7", "--verify", "--quiet", f"{name}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if found.returncode else found.stdout.strip()


def compared(commit: str, rounds: int, steps: int) -> list[tuple[dict, dict]]:
    "What `timed` returns for this checkout and the commit, in each round."
    with tempfile.TemporaryDirectory() as folder:
        then, pairs = Path(folder) / "then", []
        add = ["git", "worktree", "add", "--detach", "--quiet", then, commit]
        subprocess.run(add, cwd=ROOT, check=True)
        try:
            for turn in range(rounds):
                order = (ROOT, then) if turn % 2 == 0 else (then, ROOT)  # a drift falls on both
                found = {checkout: timed(checkout, steps) for checkout in order}
                pairs.append((found[ROOT], found[then]))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", then], cwd=ROOT, check=True)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="hash, branch or tag")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15, help="per round")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    commit = commit_of(given.commit)
    if commit is None:
        parser.error(
            f"no commit {given.commit!r} in this repository: "
            "give a hash, branch or tag that `git log --all` shows"
        )
    rounds = compared(commit, given.rounds, given.steps)
    ours, baseline = ([median(side["times"]) for side in sides] for sides in zip(*rounds))
    row = {
        "name": "step against itself",
        "ratio": median(baseline) / median(ours),
        "ratio_each_round": quartiles([a / o for o, a in zip(ours, baseline)]),
        "ours": quartiles(ours),
        "baseline": quartiles(baseline),
        "rounds": len(rounds),
        "steps": given.steps,
        "baseline_is": f"the same at {commit}",
    }
    each = row["ratio_each_round"]
    now, then = (1e3 * row[side]["median"] for side in ("ours", "baseline"))
    print(
        f"step: now {now:.0f} ms, at {commit} {then:.0f} ms: "
        f"ratio {row['ratio']:.2f} [{each['low']:.2f} to {each['high']:.2f}]"
    )
    if given.json:
        environment = rounds[0][0]["environment"]
        result = {"bench": "against", "quick": False, "environment": environment, "rows": [row]}
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
