"""The default training step of this checkout against that of another commit: `python tools/against.py COMMIT [--json FILE]`.

Both run in processes of their own, in turns, with what the command line settles before it loads torch; each says the median of its steps."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
STEPS = """
import sys, time
from scaledreamer.commands import entry
getattr(entry, "settle", lambda: None)()
import torch
from scaledreamer.bench.pairs import environment
from scaledreamer.bench.steps import Steps, start
step, times = Steps(start("cpu", False)), []
for _ in range(5 + int(sys.argv[1])):
    before = time.perf_counter()
    step()
    times.append(time.perf_counter() - before)
import json
print(json.dumps({"times": times[5:], "environment": environment("cpu")}))
"""


def timed(checkout: Path, steps: int) -> dict:
    done = subprocess.run([sys.executable, "-c", STEPS, str(steps)], cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{checkout}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15, help="of a round")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        then = Path(folder) / "then"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", then, given.commit], cwd=ROOT, check=True)
        try: rounds = [(timed(ROOT, given.steps), timed(then, given.steps)) for _ in range(given.rounds)]
        finally: subprocess.run(["git", "worktree", "remove", "--force", then], cwd=ROOT, check=True)
    each = [(median(now["times"]), median(then["times"])) for now, then in rounds]
    ratios = sorted(then / now for now, then in each)
    commit = subprocess.run(["git", "rev-parse", given.commit], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    row = {"name": "step against itself", "ratio": median(ratios), "ratio_each_round": {"median": median(ratios), "low": ratios[0], "high": ratios[-1]},
           "ours": {"median": median(now for now, _ in each)}, "anchor": {"median": median(then for _, then in each)}, "rounds": len(each), "steps": given.steps, "anchor_is": f"the same at {commit[:7]}"}
    print(f"step: now {1e3 * row['ours']['median']:.0f} ms, at {commit[:7]} {1e3 * row['anchor']['median']:.0f} ms: {row['ratio']:.2f} times as fast [{ratios[0]:.2f} to {ratios[-1]:.2f}]")
    if given.json: given.json.write_text(json.dumps({"bench": "against", "quick": False, "environment": rounds[0][0]["environment"], "rows": [row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
