# Does what /kind names, in a child, when there is such a file; ends the child when the file is gone.

import ctypes
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
kept = []


def ok(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "cannot")
    return result


def syscall(number, *args):
    return ok(libc.syscall(number, *args))


def unshare(flags):
    ok(libc.unshare(flags))


def with_child(flags):
    unshare(flags)
    if os.fork() == 0:
        time.sleep(9999)


def memfd_program():
    fd = os.memfd_create("program")
    os.write(fd, open("/bin/busybox", "rb").read())
    if os.fork() == 0:
        os.execv("/proc/self/fd/%d" % fd, ["sleep", "9999"])
    os.close(fd)
    time.sleep(0.5)


def file_with_links(at):
    path = "%s/file-%d" % (at, os.getpid())
    kept.append(open(path, "w"))
    os.link(path, path + "-other")
    os.unlink(path)


def replaced_library():
    """As a package manager does it with a file of the image."""
    path = "/replaced"
    with open(path) as file:
        kept.append(mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ))
    with open(path + ".new", "w") as file:
        file.write("new" * 4000)
    os.rename(path + ".new", path)


def mapped_file_with_links():
    path = "/map-%d" % os.getpid()
    with open(path, "w+b") as file:
        file.write(b"x" * 9000)
        file.flush()
        kept.append(mmap.mmap(file.fileno(), 9000))
    os.link(path, path + "-other")
    os.unlink(path)


def program_with_links():
    path = "/program-%d" % os.getpid()
    with open(path, "wb") as file:
        file.write(open("/bin/busybox", "rb").read())
    os.chmod(path, 0o755)
    os.link(path, path + "-other")
    if os.fork() == 0:
        os.execv(path, ["sleep", "9999"])
    time.sleep(0.5)
    os.unlink(path)


def huge_pages():
    with open("/proc/sys/vm/nr_hugepages", "w") as file:
        file.write("4")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000
    kept.append(mmap.mmap(-1, 2 << 20, flags))


def overlay():
    for name in ("lower", "upper", "work", "merged"):
        os.makedirs("/tmp/" + name, exist_ok=True)
    unshare(0x20000)
    ok(libc.mount(b"none", b"/", None, (1 << 18) | 16384, None))
    options = b"lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work"
    ok(libc.mount(b"overlay", b"/tmp/merged", b"overlay", 0, options))


def deadline():
    attributes = struct.pack("IIQiIQQQ", 48, 6, 0, 0, 0, 10_000_000, 30_000_000, 30_000_000)
    syscall(314, 0, attributes, 0)


def traced():
    child = os.fork()
    if child == 0:
        libc.ptrace(0, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(9999)
    os.waitpid(child, os.WUNTRACED)


def backlog():
    server = socket.socket(socket.AF_UNIX)
    server.bind("\0backlog")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("\0backlog")
    client.send(b"early")
    kept.extend([server, client])


def packets():
    read, write = os.pipe2(os.O_DIRECT)
    os.write(write, b"packet")
    kept.extend([read, write])


def io_uring():
    kept.append(syscall(425, 8, ctypes.create_string_buffer(200)))


def mapped_file_with_lock():
    import fcntl
    file = open("/locked", "w+b")
    file.write(b"x" * 4096)
    file.flush()
    fcntl.lockf(file, fcntl.LOCK_EX, 1)
    kept.extend([file, mmap.mmap(file.fileno(), 4096)])


def bound(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    kept.append(server)


def socket_links():
    bound("/tmp/socket-links")
    os.link("/tmp/socket-links", "/tmp/socket-other")


def socket_elsewhere():
    bound("/tmp/socket-elsewhere")
    os.mkdir("/tmp/elsewhere")
    os.link("/tmp/socket-elsewhere", "/tmp/elsewhere/socket")
    os.unlink("/tmp/socket-elsewhere")


def socket_relative():
    os.chdir("/tmp")
    bound("relative")
    os.rename("relative", "absolute")


def socket_removed():
    bound("/tmp/socket-removed")
    os.unlink("/tmp/socket-removed")


def dead_leader():
    import threading
    threading.Thread(target=time.sleep, args=(9999,)).start()
    libc.syscall(60, 0)


KINDS = {
    "nothing": lambda: None,
    "lock-mapped": mapped_file_with_lock,
    "uts": lambda: unshare(0x04000000),
    "ipc": lambda: unshare(0x08000000),
    "time": lambda: with_child(0x80),
    "time-for-children": lambda: unshare(0x80),
    "net": lambda: unshare(0x40000000),
    "user": lambda: unshare(0x10000000),
    "cgroup": lambda: unshare(0x02000000),
    "pid": lambda: with_child(0x20000000),
    "memfd-program": memfd_program,
    "links": lambda: file_with_links("/"),
    "links-tmpfs": lambda: file_with_links("/tmp"),
    "replaced": replaced_library,
    "links-mapped": mapped_file_with_links,
    "links-program": program_with_links,
    "huge-pages": huge_pages,
    "overlay": overlay,
    "deadline": deadline,
    "traced": traced,
    "backlog": backlog,
    "packets": packets,
    "io-uring": io_uring,
    "socket-links": socket_links,
    "socket-elsewhere": socket_elsewhere,
    "socket-relative": socket_relative,
    "socket-removed": socket_removed,
    "dead-leader": dead_leader,
}


def run(kind):
    os.setpgid(0, 0)
    KINDS[kind]()
    open("/ready", "w").close()
    time.sleep(9999)


while True:
    time.sleep(0.02)
    try:
        kind = open("/kind").read().strip()
    except FileNotFoundError:
        continue
    child = os.fork()
    if child == 0:
        try:
            run(kind)
        except BaseException as error:
            with open("/ready", "w") as file:
                file.write(repr(error))
        time.sleep(9999)
    if kind == "dead-leader":
        time.sleep(0.5)
        open("/ready", "w").close()
    while os.path.exists("/kind"):
        time.sleep(0.02)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass
    kept.clear()
    open("/idle", "w").close()
