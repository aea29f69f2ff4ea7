"""Makes network devices of each kind by netlink, and prints the kinds that there are not."""

import fcntl
import os
import stat
import struct

from links import Links, attribute, number

# Kind, requirements, and whether the device lies on another device.
KINDS = [
    ("veth", b"", False),
    ("bridge", b"", False),
    ("ifb", b"", False),
    ("netkit", b"", False),
    ("wireguard", b"", False),
    ("macvlan", attribute(1, number(4)), True),
    ("macvtap", attribute(1, number(4)), True),
    ("ipvlan", attribute(1, struct.pack("H", 0)), True),
    ("ipvtap", attribute(1, struct.pack("H", 0)), True),
    ("vlan", attribute(1, struct.pack("H", 7)), True),
    ("vxlan", attribute(1, number(5)) + attribute(15, struct.pack(">H", 4789)), False),
    ("geneve", attribute(1, number(5)) + attribute(2, bytes([127, 0, 0, 1])), False),
    ("ipip", attribute(2, bytes([10, 0, 0, 1])) + attribute(3, bytes([10, 0, 0, 2])), False),
    ("gre", attribute(6, bytes([10, 0, 0, 1])) + attribute(7, bytes([10, 0, 0, 2])), False),
    ("sit", attribute(2, bytes([10, 0, 0, 1])) + attribute(3, bytes([10, 0, 0, 2])), False),
]


def tun():
    os.makedirs("/dev/net", exist_ok=True)
    if not os.path.exists("/dev/net/tun"):
        os.mknod("/dev/net/tun", stat.S_IFCHR | 0o600, os.makedev(10, 200))
    with open("/dev/net/tun", "r+b", buffering=0) as device:
        # TUNSETIFF with IFF_TUN | IFF_NO_PI
        fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", b"of-a-tun", 0x1001))


print("there are", " ".join(sorted(os.listdir("/sys/class/net"))))
links = Links()
for kind, data, lies_on in KINDS:
    try:
        links.add("below", "dummy")
        links.add("made", kind, data, "below" if lies_on else None)
        links.remove("made")
        links.remove("below")
    except OSError as error:
        print(f"{kind}: {error}")
        if os.path.exists("/sys/class/net/below"):
            links.remove("below")
try:
    tun()
except OSError as error:
    print(f"tun: {error}")
print("asked")
