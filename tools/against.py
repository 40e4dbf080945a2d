"""The default training step of this checkout against that of another commit: `python tools/against.py COMMIT [--json FILE]`.

Both run in processes of their own, in turns, with what the command line settles before it loads torch; each says the median of its steps. The
result has the form of `scaledreamer bench`: ratio of the medians, and the quartiles round by round."""

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
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(steps)],
        cwd=checkout,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(
                [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(
            f"{checkout}: {([f'exit code {done.returncode}'] + done.stderr.strip().splitlines())[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15, help="of a round")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = subprocess.run(
        ["git", "rev-parse", "--short=7", "--verify", "--quiet", f"{given.commit}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        parser.error(
            f"no commit {given.commit!r} in this repository: give a hash, branch or tag that `git log --all` shows"
        )
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        then = Path(folder) / "then"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", then, commit], cwd=ROOT, check=True
        )
        try:
            rounds = []
            for turn in range(given.rounds):
                order = (ROOT, then) if turn % 2 == 0 else (then, ROOT)  # a drift falls on both
                found = {checkout: timed(checkout, given.steps) for checkout in order}
                rounds.append((found[ROOT], found[then]))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", then], cwd=ROOT, check=True)
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
    print(
        f"step: now {1e3 * row['ours']['median']:.0f} ms, at {commit} {1e3 * row['baseline']['median']:.0f} ms: ratio {row['ratio']:.2f} [{each['low']:.2f} to {each['high']:.2f}]"
    )
    if given.json:
        given.json.write_text(
            json.dumps(
                {
                    "bench": "against",
                    "quick": False,
                    "environment": rounds[0][0]["environment"],
                    "rows": [row],
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
