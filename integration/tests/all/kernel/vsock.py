"""Tries to make sockets that lead out of the VM, in the ways that there are, and prints what happens."""

import ctypes
import mmap
import os
import socket
import struct

AF_VSOCK = 40
SETUP, ENTER = 425, 426
IORING_OP_SOCKET = 45

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *args):
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def by_socket():
    socket.socket(AF_VSOCK, socket.SOCK_STREAM).close()


def by_io_uring():
    parameters = ctypes.create_string_buffer(120)
    ring = call(SETUP, 1, parameters)
    entries, completions = struct.unpack_from("II", parameters)
    sq_tail, sq_array = (struct.unpack_from("I", parameters, 40 + at)[0] for at in (4, 24))
    cqes = struct.unpack_from("I", parameters, 80 + 20)[0]
    queue = mmap.mmap(ring, sq_array + 4 * entries, offset=0)
    done = mmap.mmap(ring, cqes + 16 * completions, offset=0x8000000)
    requests = mmap.mmap(ring, 64 * entries, offset=0x10000000)
    # opcode, flags, priority, fd (the domain), offset (the type), address, length (the protocol)
    requests[:28] = struct.pack("=BBHiQQI", IORING_OP_SOCKET, 0, 0, AF_VSOCK, socket.SOCK_STREAM, 0, 0)
    queue[sq_array : sq_array + 4] = struct.pack("I", 0)
    queue[sq_tail : sq_tail + 4] = struct.pack("I", 1)
    call(ENTER, ring, 1, 1, 1, None, 0)
    result = struct.unpack_from("i", done, cqes + 8)[0]
    if result < 0:
        raise OSError(-result, os.strerror(-result))


for way in (by_socket, by_io_uring):
    try:
        way()
        print(f"{way.__name__}: made")
    except OSError as error:
        print(f"{way.__name__}: {error}")
