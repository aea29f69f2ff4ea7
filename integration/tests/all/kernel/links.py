"""A few requests of rtnetlink."""

import os
import socket
import struct

RTM_NEWLINK, RTM_DELLINK = 16, 17
REQUEST, ACK, CREATE, EXCLUSIVE = 1, 4, 0x400, 0x200
IFLA_IFNAME, IFLA_LINK, IFLA_LINKINFO = 3, 5, 18
INFO_KIND, INFO_DATA = 1, 2


def attribute(kind, payload):
    size = len(payload) + 4
    return struct.pack("HH", size, kind) + payload + b"\0" * (-size % 4)


def number(value):
    return struct.pack("I", value)


class Links:
    def __init__(self):
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

    def request(self, kind, flags, index, attributes):
        body = struct.pack("BxHiII", 0, 0, index, 0, 0) + attributes
        header = struct.pack("IHHII", len(body) + 16, kind, REQUEST | ACK | flags, 1, 0)
        self.socket.send(header + body)
        error = struct.unpack_from("i", self.socket.recv(65536), 16)[0]
        if error:
            raise OSError(-error, os.strerror(-error))

    def add(self, name, kind, data=b"", below=None):
        attributes = attribute(IFLA_IFNAME, name.encode() + b"\0")
        if below:
            attributes += attribute(IFLA_LINK, number(socket.if_nametoindex(below)))
        info = attribute(INFO_KIND, kind.encode())
        if data:
            info += attribute(INFO_DATA, data)
        self.request(RTM_NEWLINK, CREATE | EXCLUSIVE, 0, attributes + attribute(IFLA_LINKINFO, info))

    def remove(self, name):
        self.request(RTM_DELLINK, 0, socket.if_nametoindex(name), b"")
