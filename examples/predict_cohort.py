"""Segments a cohort with several processes, on one or several GPUs or on the CPU.

    accelerate launch --multi_gpu --num_processes 4 examples/predict_cohort.py scans/ -p liver -p spleen -o out/
    torchrun --nproc-per-node 4 examples/predict_cohort.py scans/ -p liver -p spleen -o out/

Both commands work without a GPU, too. `accelerate launch --cpu --num_processes 4` does not: it starts one process
(accelerate 1.15 starts several on the CPU through mpirun), which then segments all studies. The first line that each
process prints says how many there are.

The processes share the studies: each study is segmented by one of them, and the masks are those of a single process.
Nothing passes between the processes but the output folder, so that they need no process group and none waits for one
that has died. Whatever is killed, the same command goes on: finished studies are kept, and the others are taken over.
In the end `volumes.csv` in the output folder has the volume of every structure of every study. Where studies failed,
the first process ends with the exit code 2, or 1 where one failed by a bug; the launchers report that as a failure.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from mome.cli.exit_codes import guarded
from mome.cli.quiet import quiet_libraries
from mome.inference import Segmenter, segment_folder, segment_jobs
from mome.inference.choose_model import Choice, choose_model
from mome.inference.jobs import job_prompts
from mome.inference.volumes_table import write_volumes


def main() -> int:
    parser = argparse.ArgumentParser(description="Segments a cohort with several processes.")
    parser.add_argument("inputs", nargs="*", help="scans, or folders of scans")
    parser.add_argument("--jobs", help="a JSON file of scans, each with its own prompts, in place of inputs")
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a structure; may be repeated")
    parser.add_argument("-o", "--out", required=True, help="folder for the masks")
    parser.add_argument(
        "-m", "--model", help="folder, bundled name or Hub id; default: the bundled model that knows the prompts"
    )
    parser.add_argument("--recursive", action="store_true", help="also search the folders inside of a folder")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each process")
    args = parser.parse_args()
    if bool(args.jobs) == bool(args.inputs):
        parser.error("give either scans or --jobs")

    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    # accelerate launch and torchrun tell a process its place by these variables.
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    print(f"process {rank + 1} of {processes} on {device}\n", end="", flush=True)

    def on_done(entry: dict) -> None:
        if not entry.get("skipped"):
            # One write with its line end: torchrun starts Python with -u, and lines of two processes would join.
            print(f"[{rank}] {entry['name']}: {entry['status']}\n", end="", flush=True)

    prompts = job_prompts(args.jobs, args.prompt) if args.jobs else args.prompt
    chosen = Choice(args.model, None) if args.model else choose_model(prompts)
    if chosen.note and rank == 0:
        print(f"{chosen.note}\n", end="", file=sys.stderr)
    segmenter = Segmenter(chosen.model, device=device)
    # With resume=True processes claim studies before they segment them, and skip what is finished.
    options = {"resume": True, "part": (rank, processes), "on_done": on_done}
    if args.jobs:
        entries = segment_jobs(segmenter, args.jobs, args.out, args.prompt, **options)
    else:
        entries = segment_folder(segmenter, args.inputs, args.out, args.prompt, recursive=args.recursive, **options)
    # Each process is here only once all studies are finished, and writes the same table.
    write_volumes(Path(args.out))
    failed = [entry for entry in entries if entry["status"] == "failed"]
    if failed and rank == 0:
        print(f"{len(failed)} of {len(entries)} studies failed; {args.out}/problems.json says why", file=sys.stderr)
    # Launchers end the other processes after a code other than 0. All studies are finished by then, so nothing is lost.
    code = 1 if any(entry.get("failure", {}).get("bug") for entry in failed) else 2
    return code if failed and rank == 0 else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
