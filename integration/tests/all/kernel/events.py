"""Listens to the kernel's device events. For each line in /dev/shm/ask it says in /dev/shm/answer what has come since the last.

    act   makes and removes a loop device and a network device first
"""

import fcntl
import os
import select
import socket
import stat

from links import Links

KOBJECT_UEVENT = 15
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81


def act():
    links = Links()
    links.add("of-a-test", "dummy")
    links.remove("of-a-test")
    # A container without a snapshot is restored without the files that it has made.
    if not os.path.exists("/loop-control"):
        os.mknod("/loop-control", stat.S_IFCHR | 0o600, os.makedev(10, 237))
    with open("/loop-control") as control:
        fcntl.ioctl(control, LOOP_CTL_ADD, 77)
        fcntl.ioctl(control, LOOP_CTL_REMOVE, 77)


def events():
    """Events are in the socket when the call that causes them returns."""
    while select.select([listener], [], [], 0)[0]:
        yield listener.recv(65536).split(b"\0")[0].decode()


listener = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, KOBJECT_UEVENT)
listener.bind((0, 1))
for name in ["/dev/shm/ask", "/dev/shm/answer"]:
    os.mkfifo(name)
# For both directions, so that it never ends.
with open(os.open("/dev/shm/ask", os.O_RDWR)) as ask:
    print("listening", flush=True)
    while line := ask.readline():
        if line.strip() == "act":
            act()
        with open("/dev/shm/answer", "w") as answer:
            answer.write("".join(f"{event}\n" for event in events()))
