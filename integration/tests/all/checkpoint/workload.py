# Holds one of everything that a checkpoint must preserve, prints "ready", waits for /tmp/go, and then prints
# what has changed: nothing, if the restore was correct.

import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib

MEMORY = int(sys.argv[1]) << 20
PROBLEMS = []


def check(what, holds):
    if not holds:
        PROBLEMS.append(what)


# Memory with a checksum: no two pages are alike.
block = os.urandom(1 << 20)
memory = bytearray(MEMORY)
for at in range(0, MEMORY, 4096):
    memory[at:at + 4096] = block[at % (1 << 20):][:4088] + at.to_bytes(8, "little")
checksum = zlib.crc32(memory)

# A file without a name, and one whose offset matters.
gone = open("/tmp/gone", "w+b")
gone.write(b"still there")
gone.flush()
os.unlink("/tmp/gone")
placed = open("/tmp/placed", "w+b")
placed.write(b"0123456789")
placed.seek(4)

# A pipe and a socket with something in them, and a poll on both.
pipe_read, pipe_write = os.pipe()
os.write(pipe_write, b"p" * 1000)
left, right = socket.socketpair()
left.send(b"in a socket")
poll = select.epoll()
poll.register(pipe_read, select.EPOLLIN)
poll.register(right.fileno(), select.EPOLLIN)

# A socket with a name.
named = socket.socket(socket.AF_UNIX)
named.bind("/tmp/named")
named.listen()

# Memory files, and memory that is shared with a child.
memory_file = os.memfd_create("kept")
os.write(memory_file, b"memory file")
shared = mmap.mmap(-1, 4096)
shared[0] = 1

# Timers and events.
timer = os.timerfd_create(time.CLOCK_MONOTONIC)
os.timerfd_settime(timer, initial=5000)
event = os.eventfd(41)
alarms = 0


def alarm(*_):
    global alarms
    alarms += 1


signal.signal(signal.SIGALRM, alarm)
signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)

# A child that holds a lock and answers.
request_read, request_write = os.pipe()
answer_read, answer_write = os.pipe()
child = os.fork()
if child == 0:
    signal.setitimer(signal.ITIMER_REAL, 0)
    held = open("/tmp/lock", "w")
    fcntl.lockf(held, fcntl.LOCK_EX)
    os.write(answer_write, b"L")
    while os.read(request_read, 1):
        shared[0] += 1
        os.write(answer_write, b"A")
    os._exit(0)
os.read(answer_read, 1)
lock = open("/tmp/lock", "w")


def locked():
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


check("the lock is held before", locked())

# A listening server, and a connection that is established.
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", 7001))
server.listen()
client = socket.create_connection(("127.0.0.1", 7001))
accepted, _ = server.accept()
client.sendall(b"on its way")

# A database with data and a client that stays connected.
redis = subprocess.Popen(
    ["redis-server", "--port", "7002", "--save", "", "--dir", "/tmp", "--logfile", "/tmp/redis.log"],
    stdin=subprocess.DEVNULL,
)


def connect():
    for _ in range(600):
        try:
            return socket.create_connection(("127.0.0.1", 7002))
        except OSError:
            time.sleep(0.1)
    raise SystemExit("redis does not answer")


database = connect()


def ask(*words):
    database.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
    return database.recv(4096)


for number in range(200):
    ask(b"SET", b"key%d" % number, b"value %d" % number)

# A directory that is watched (inotify(7)), by the C library: Python has no functions for it.
os.mkdir("/tmp/watched")
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
IN_CREATE = 0x100
check("the watch is set", libc.inotify_add_watch(watch, b"/tmp/watched", IN_CREATE) == 1)

# Threads, which continue counting.
counts = [0] * 4


def count(number):
    while True:
        counts[number] += 1
        time.sleep(0.02)


for number in range(len(counts)):
    threading.Thread(target=count, args=(number,), daemon=True).start()

before, alarms_before, since = list(counts), alarms, time.monotonic()
with open("/tmp/ready", "w") as ready:
    ready.write("ready\n")
while not os.path.exists("/tmp/go"):
    time.sleep(0.05)
time.sleep(0.5)

check("memory", zlib.crc32(memory) == checksum)
check("threads", all(now > then for now, then in zip(counts, before)))
gone.seek(0)
check("a file without a name", gone.read() == b"still there")
check("a place in a file", placed.read() == b"456789")
check("poll", {fd for fd, _ in poll.poll(1)} == {pipe_read, right.fileno()})
check("a pipe's content", os.read(pipe_read, 4096) == b"p" * 1000)
check("a socket's content", right.recv(100) == b"in a socket")
caller = socket.socket(socket.AF_UNIX)
caller.connect("/tmp/named")
named.accept()[0].send(b"hi")
check("a named socket", caller.recv(10) == b"hi")
os.lseek(memory_file, 0, os.SEEK_SET)
check("a memory file", os.read(memory_file, 100) == b"memory file")
left_of_timer = os.timerfd_gettime(timer)[0]
check(f"a timer: {left_of_timer}", 0 < left_of_timer < 5000)
check("an event", os.eventfd_read(event) == 41)
check("alarms", alarms > alarms_before)
check("the clock", 0 < time.monotonic() - since < 3000)
check("a lock", locked())
os.write(request_write, b"?")
check("a child", os.read(answer_read, 1) == b"A")
check("shared memory", shared[0] == 2)
check("an established connection", accepted.recv(100) == b"on its way")
accepted.sendall(b"and back")
check("and its other direction", client.recv(100) == b"and back")
another = socket.create_connection(("127.0.0.1", 7001))
server.accept()[0].sendall(b"new")
check("a listening server", another.recv(10) == b"new")
check("the database's data", all(
    ask(b"GET", b"key%d" % number) == b"$%d\r\nvalue %d\r\n" % (len(b"value %d" % number), number)
    for number in range(200)
))
check("the database's memory of it", ask(b"DBSIZE") == b":200\r\n")
with open("/tmp/watched/new", "w"):
    pass
events = os.read(watch, 4096) if select.select([watch], [], [], 5)[0] else b""
check("inotify", events[16:].rstrip(b"\0") == b"new")
with open("/tmp/result.new", "w") as result:
    result.write("\n".join(PROBLEMS) or "as it was")
os.rename("/tmp/result.new", "/tmp/result")
while True:
    time.sleep(1)
