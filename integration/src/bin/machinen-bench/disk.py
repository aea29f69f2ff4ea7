"""Work on files in the container's root file system and, by turns, on the same disk without the overlay.

Prints one line for each round and kind of work: its name, seconds in the root file system, seconds on the bare disk.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import time

ROUNDS = int(sys.argv[1])
DEVICE = "/dev/disk"
BARE = "/dev/bare"


def find_writable():
    """The major and minor number of the disk that takes the container's writes."""
    for name in os.listdir("/sys/block"):
        read = lambda file: open(f"/sys/block/{name}/{file}").read().strip()
        if name.startswith("sd") and read("ro") == "0":
            return os.makedev(*map(int, read("dev").split(":")))
    sys.exit("there is no writable disk")


def mount_bare():
    """A second mount of a disk shows the same file system."""
    os.mknod(DEVICE, 0o600 | 0o060000, find_writable())
    os.mkdir(BARE)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(DEVICE.encode(), BARE.encode(), b"ext4", 0, None) != 0:
        sys.exit(f"cannot mount the disk: {os.strerror(ctypes.get_errno())}")


def untar(work):
    subprocess.run(["tar", "xf", "/files.tar", "-C", work], check=True)
    os.sync()


def small_synced(work):
    block = os.urandom(4096)
    with open(f"{work}/log", "wb", buffering=0) as log:
        for _ in range(300):
            log.write(block)
            os.fsync(log.fileno())


def sequential(work):
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={work}/large", "bs=1M", "count=256", "conv=fsync"],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def timed(task, base):
    work = f"{base}/files-of-the-bench"
    os.mkdir(work)
    os.sync()
    begun = time.monotonic()
    task(work)
    taken = time.monotonic() - begun
    shutil.rmtree(work)
    return taken


mount_bare()
for number in range(ROUNDS + 1):
    for task in untar, small_synced, sequential:
        # The first of two finds colder caches, so the two take turns.
        order = ["/root", BARE] if number % 2 else [BARE, "/root"]
        taken = {base: timed(task, base) for base in order}
        # The first round is not counted: it runs code that the guest has not run before.
        if number > 0:
            print(task.__name__, taken["/root"], taken[BARE], flush=True)
