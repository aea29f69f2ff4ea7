"""Asks the kernel for what programs look for, and prints what it does not have, one line each."""

import ctypes
import os
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *args):
    if libc.syscall(ctypes.c_long(number), *args) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def words(*values):
    return ctypes.byref((ctypes.c_ulong * len(values))(*values))


def io_uring():
    call(425, 8, ctypes.create_string_buffer(200))


def get_mempolicy():
    call(239, None, None, 0, None, 0)


def set_mempolicy():
    # MPOL_INTERLEAVE over node 0, and back to MPOL_DEFAULT.
    call(238, 3, words(1), 64)
    call(238, 0, None, 0)


def memfd_secret():
    call(447, 0)


def landlock():
    # LANDLOCK_CREATE_RULESET_VERSION
    call(444, None, 0, 1)


def userfaultfd():
    # UFFD_USER_MODE_ONLY
    call(323, 1)


def perf_event():
    # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK; disabled, without kernel and hypervisor
    attributes = struct.pack("IIQQQQQ", 1, 112, 0, 0, 0, 0, 1 | 32 | 64).ljust(128, b"\0")
    call(298, attributes, 0, -1, -1, 0)


def perf_breakpoint():
    # PERF_TYPE_BREAKPOINT on writes to a variable, as debuggers do.
    watched = ctypes.c_long()
    attributes = struct.pack("IIQQQQQII", 5, 112, 0, 0, 0, 0, 1 | 32 | 64, 0, 2)
    attributes += struct.pack("QQ", ctypes.addressof(watched), 8)
    call(298, attributes.ljust(128, b"\0"), 0, -1, -1, 0)


def pidfd():
    os.close(os.pidfd_open(os.getpid()))


def membarrier():
    # MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED
    call(324, 16, 0)


def mqueue():
    call(240, b"of-a-test", os.O_CREAT | os.O_RDWR, 0o600, None)


def keyring():
    # KEYCTL_GET_KEYRING_ID of the session's, made if it is not there
    call(250, 0, -3, 1)


def kcmp():
    call(312, os.getpid(), os.getpid(), 1, 0, 0)


def native_aio():
    call(206, 8, words(0))


def vm_copy():
    text = ctypes.create_string_buffer(b"text")
    vector = words(ctypes.addressof(text), 5)
    call(310, os.getpid(), vector, 1, vector, 1, 0)


def crypto_hash():
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as algorithm:
        algorithm.bind(("hash", "sha256"))
        request = algorithm.accept()[0]
        request.sendall(b"abc")
        assert request.recv(32).hex().startswith("ba7816bf")


def crypto_cipher():
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as algorithm:
        algorithm.bind(("skcipher", "xts(aes)"))


def congestion_control():
    with socket.socket() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


def file_systems():
    names = {line.split("\t")[1].strip() for line in open("/proc/filesystems")}
    wanted = {"autofs", "binfmt_misc", "bpf", "cgroup2", "erofs", "ext2", "ext4", "fuse", "hugetlbfs", "iso9660"}
    wanted |= {"mqueue", "overlay", "securityfs", "squashfs", "tmpfs", "tracefs", "vfat"}
    assert names >= wanted, wanted - names


def controllers():
    lines = [line.split() for line in open("/proc/cgroups") if not line.startswith("#")]
    enabled = {name for name, _, _, state in lines if state == "1"}
    wanted = {"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc", "net_cls"}
    wanted |= {"net_prio", "perf_event", "pids", "rdma"}
    assert enabled >= wanted, wanted - enabled


def settings():
    for name, wanted in [
        ("vm/max_map_count", 1 << 20),
        ("kernel/pid_max", 1 << 22),
        ("fs/nr_open", 1 << 30),
        ("fs/file-max", 1 << 40),
    ]:
        value = int(open("/proc/sys/" + name).read())
        # nr_open is the highest multiple that the kernel accepts.
        assert value >= wanted - (1 << 20), f"{name} is {value}"


# Names of tables and extensions, as the programs iptables-legacy and ip6tables-legacy ask for them.
TABLES = ["filter", "nat", "mangle", "raw", "security"]
MATCHES = """addrtype bpf cgroup comment connbytes connlimit connmark conntrack dscp hashlimit helper icmp iprange
    ipvs length limit mac mark multiport owner physdev pkttype policy quota realm recent rpfilter set socket state
    statistic string tcp tcpmss time ttl u32 udp""".split()
TARGETS = """CHECKSUM CLASSIFY CONNMARK CT DNAT DSCP LOG MARK MASQUERADE NETMAP NFLOG NFQUEUE REDIRECT REJECT SNAT
    TCPMSS TEE TPROXY TRACE SET""".split()
ONLY_V4 = {"icmp", "ttl", "realm"}
GET_INFO, GET_MATCH, GET_TARGET = 64, 66, 67


def packet_filter(family, level, first, skipped):
    """`first` is where the two numbers of extensions start: they differ between the families."""
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for table in TABLES:
            info = bytearray(struct.pack("32s", table.encode()).ljust(84, b"\0"))
            yield f"table {table}", ask(raw, level, GET_INFO, info)
        for option, names in [(first, MATCHES), (first + 1, TARGETS)]:
            for name in names:
                if name not in skipped:
                    # The program itself finds out which revisions exist; this only asks for the name.
                    found = any(
                        ask(raw, level, option, bytearray(struct.pack("29sB", name.encode(), revision)))
                        for revision in range(5)
                    )
                    yield f"extension {name}", found


def ask(raw, level, option, buffer):
    size = ctypes.c_uint(len(buffer))
    data = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    return libc.getsockopt(raw.fileno(), level, option, data, ctypes.byref(size)) == 0


def ipv4_filter():
    missing = [name for name, found in packet_filter(socket.AF_INET, 0, GET_MATCH, set()) if not found]
    assert not missing, missing


def ipv6_filter():
    missing = [name for name, found in packet_filter(socket.AF_INET6, 41, GET_MATCH + 2, ONLY_V4) if not found]
    assert not missing, missing


# Each starts with its own name in the message.
CHECKS = [
    io_uring, get_mempolicy, set_mempolicy, memfd_secret, landlock, userfaultfd, perf_event, perf_breakpoint, pidfd,
    membarrier, mqueue, keyring, kcmp, native_aio, vm_copy, crypto_hash, crypto_cipher, congestion_control,
    file_systems, controllers, settings, ipv4_filter, ipv6_filter,
]  # fmt: skip

for check in CHECKS:
    if len(sys.argv) == 1 or check.__name__ in sys.argv[1:]:
        try:
            check()
        except (OSError, AssertionError) as error:
            print(f"{check.__name__}: {error}")
print("asked")
