"""Work on files in each of the directories that are named, by turns; `large` and `tree` are in each of them.

Prints one line for each round and kind of work: its name, and the seconds that it took in each directory.
"""

import os
import random
import sys
import time

ROUNDS, DIRS = int(sys.argv[1]), sys.argv[2:]
LARGE = 128 << 20
BLOCK = 1 << 20


def write(base):
    block = bytes(BLOCK)
    with open(f"{base}/written", "wb", buffering=0) as file:
        for _ in range(LARGE // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    os.remove(f"{base}/written")


def read(base):
    with open(f"{base}/large", "rb", buffering=0) as file:
        left = LARGE
        while block := file.read(BLOCK):
            left -= len(block)
    assert left == 0, left


def random_reads(base):
    places = random.Random(1)
    with open(f"{base}/large", "rb", buffering=0) as file:
        for _ in range(2000):
            assert len(os.pread(file.fileno(), 4096, places.randrange(LARGE // 4096) * 4096)) == 4096


def small_files(base):
    os.mkdir(f"{base}/small")
    for number in range(1000):
        with open(f"{base}/small/{number}", "wb", buffering=0) as file:
            file.write(b"x" * 1024)
    for number in range(1000):
        os.remove(f"{base}/small/{number}")
    os.rmdir(f"{base}/small")


def status(base):
    """What git-status(1) asks of a tree: all directories are read, and each file is looked up."""
    seen = 0
    for directory, _, names in os.walk(f"{base}/tree"):
        for name in names:
            os.lstat(f"{directory}/{name}")
            seen += 1
    assert seen == 5000, seen


def timed(task, base):
    begun = time.monotonic()
    task(base)
    return time.monotonic() - begun


for number in range(ROUNDS + 1):
    for task in write, read, random_reads, small_files, status:
        taken = {base: timed(task, base) for base in (DIRS if number % 2 else reversed(DIRS))}
        # The first round is not counted: it runs code that the guest has not run before.
        if number > 0:
            print(task.__name__, *(taken[base] for base in DIRS), flush=True)
