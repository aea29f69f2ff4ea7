# Binds sockets and gives their files other names, then answers each client with the socket's label and
# address. `sockets.py ask` is the client of all of them and prints the answers.

import os
import socket
import sys
import threading
import time

# The paths at which each label is reachable.
SOCKETS = {
    "linked": (socket.SOCK_STREAM, "/tmp/linked"),
    "renamed": (socket.SOCK_STREAM, "/renamed"),
    "datagram": (socket.SOCK_DGRAM, "/tmp/datagram"),
    "packet": (socket.SOCK_SEQPACKET, "/tmp/packet"),
    "directory": (socket.SOCK_STREAM, "/tmp/new/socket"),
    "older": (socket.SOCK_STREAM, "/tmp/name.1"),
    "newer": (socket.SOCK_STREAM, "/tmp/name"),
    "relative": (socket.SOCK_STREAM, "/tmp/relative"),
    "jailed": (socket.SOCK_STREAM, "/tmp/jail/socket"),
    "plain": (socket.SOCK_STREAM, "/tmp/link/plain"),
}


def bind(label, path):
    server = socket.socket(socket.AF_UNIX, SOCKETS[label][0])
    server.bind(path)
    if SOCKETS[label][0] != socket.SOCK_DGRAM:
        server.listen()
    return server


def link(old, new):
    os.link(old, new)
    os.unlink(old)


def serve(label, server, check=lambda: None):
    def answer():
        while True:
            if SOCKETS[label][0] == socket.SOCK_DGRAM:
                _, client = server.recvfrom(100)
                send = lambda data: server.sendto(data, client)
            else:
                client, _ = server.accept()
                send = client.send
            check()
            # The last connection stays open at this end until the next one.
            send(("%s %s" % (label, server.getsockname())).encode())

    threading.Thread(target=answer).start()


def passes(one, other):
    one.send(b"x")
    assert other.recv(1) == b"x"


def connected():
    """What was there before the name went, or changed, stays connected."""
    server = bind("linked", "/tmp/linked.tmp")
    client = socket.socket(socket.AF_UNIX)
    client.connect("/tmp/linked.tmp")
    accepted, _ = server.accept()
    link("/tmp/linked.tmp", "/tmp/linked")
    serve("linked", server, lambda: passes(client, accepted))

    removed = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    removed.bind("/tmp/removed")
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect("/tmp/removed")
    os.unlink("/tmp/removed")
    server = bind("renamed", "/renamed.tmp")
    os.rename("/renamed.tmp", "/renamed")
    serve("renamed", server, lambda: passes(sender, removed))


def renamed():
    for label in ["datagram", "packet"]:
        server = bind(label, "/tmp/%s.tmp" % label)
        os.rename("/tmp/%s.tmp" % label, "/tmp/" + label)
        serve(label, server)
    os.mkdir("/tmp/old")
    server = bind("directory", "/tmp/old/socket")
    os.rename("/tmp/old", "/tmp/new")
    serve("directory", server)
    server = bind("older", "/tmp/name")
    os.rename("/tmp/name", "/tmp/name.1")
    serve("older", server)
    serve("newer", bind("newer", "/tmp/name"))


def others():
    os.chdir("/tmp")
    server = bind("relative", "relative.tmp")
    link("relative.tmp", "relative")
    serve("relative", server)
    os.chdir("/")
    os.mkdir("/tmp/dir")
    os.symlink("dir", "/tmp/link")
    serve("plain", bind("plain", "/tmp/link/plain"))


def jailed():
    os.mkdir("/tmp/jail")
    if os.fork() == 0:
        os.chroot("/tmp/jail")
        os.chdir("/")
        serve("jailed", bind("jailed", "/socket"))
        time.sleep(9999)


def left_by_its_session():
    """A child in a session whose first process has ended: CRIU makes a helper for it, which shares the root and
    working directory of this process while the sockets are bound."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(9999)
        os._exit(0)
    os.wait()


def ask():
    own = "/tmp/client-%d" % os.getpid()
    for label, (kind, path) in SOCKETS.items():
        client = socket.socket(socket.AF_UNIX, kind)
        client.settimeout(20)
        try:
            if kind == socket.SOCK_DGRAM:
                client.bind(own)
            client.connect(path)
            if kind == socket.SOCK_DGRAM:
                client.send(b"x")
            print(client.recv(100).decode())
        except OSError as error:
            print("%s: %s: %r" % (label, path, error))
    os.unlink(own)


if sys.argv[1:] == ["ask"]:
    ask()
else:
    left_by_its_session()
    jailed()
    connected()
    renamed()
    others()
    open("/dev/shm/ready", "w").close()
    while True:
        time.sleep(9999)
