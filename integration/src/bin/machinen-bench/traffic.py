"""Traffic between two ends: `serve ADDRESS` answers, and `ask ADDRESS MIB TIMES ROUNDS` measures.

The second prints one line for each round and kind of traffic: its name and the seconds that it took.
"""

import socket
import sys
import threading
import time

SINK, SOURCE, ECHO, HANG_UP, DATAGRAMS = range(7010, 7015)
BLOCK = 64 << 10
# Fits in one datagram of IPv4, in many fragments.
DATAGRAM = 60_000


def read_all(connection):
    while connection.recv(BLOCK):
        pass


def sink(connection):
    read_all(connection)
    connection.sendall(b".")


def source(connection):
    block = bytes(BLOCK)
    for _ in range(int.from_bytes(connection.recv(8), "big") // BLOCK):
        connection.sendall(block)


def echo(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while received := connection.recv(BLOCK):
        connection.sendall(received)


def hang_up(connection):
    pass


def answer(listener, handle):
    while True:
        with listener.accept()[0] as connection:
            handle(connection)


def answer_datagrams(bound):
    while True:
        bound.sendto(*bound.recvfrom(BLOCK))


def serve(address):
    threads = []
    for port, handle in (SINK, sink), (SOURCE, source), (ECHO, echo), (HANG_UP, hang_up):
        listener = socket.create_server((address, port), backlog=128)
        threads.append(threading.Thread(target=answer, args=(listener, handle)))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind((address, DATAGRAMS))
    threads.append(threading.Thread(target=answer_datagrams, args=(datagrams,)))
    for thread in threads:
        thread.start()
    print("serving", flush=True)


def send(address, mib, times):
    block = bytes(BLOCK)
    with socket.create_connection((address, SINK)) as connection:
        for _ in range((mib << 20) // BLOCK):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"."


def receive(address, mib, times):
    with socket.create_connection((address, SOURCE)) as connection:
        connection.sendall((mib << 20).to_bytes(8, "big"))
        left = mib << 20
        while received := connection.recv(BLOCK):
            left -= len(received)
        assert left == 0, left


def round_trips(address, mib, times):
    with socket.create_connection((address, ECHO)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(times):
            connection.sendall(b".")
            assert connection.recv(1) == b"."


def connections(address, mib, times):
    for _ in range(times):
        with socket.create_connection((address, HANG_UP)) as connection:
            assert connection.recv(1) == b""


def datagrams(address, mib, times):
    content = bytes(DATAGRAM)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.settimeout(60)
        own.connect((address, DATAGRAMS))
        for _ in range(times):
            own.send(content)
            assert len(own.recv(BLOCK)) == DATAGRAM


def reached(address):
    """Waits until the other end can be reached."""
    while True:
        try:
            return socket.create_connection((address, HANG_UP)).close()
        except OSError:
            time.sleep(0.1)


def ask(address, mib, times, rounds):
    reached(address)
    for number in range(rounds + 1):
        for task in send, receive, round_trips, connections, datagrams:
            begun = time.monotonic()
            task(address, mib, times)
            # The first round is not counted: it runs code that the guest has not run before.
            if number > 0:
                print(task.__name__, time.monotonic() - begun, flush=True)


if sys.argv[1] == "serve":
    serve(sys.argv[2])
else:
    ask(sys.argv[2], *map(int, sys.argv[3:6]))
