[
    ("utsns", include_str!("utsns.log"), 13383, ": Can't dump nested uts namespace for 13383"),
    (
        "iouring",
        include_str!("iouring.log"),
        22949,
        ": send_fds failed (-22) (an open file that cannot be passed on, such as an io_uring)",
    ),
    (
        "vsock",
        include_str!("vsock.log"),
        23082,
        ": sockets: BUG! Unknown socket collected (family 40) (an AF_VSOCK socket)",
    ),
    (
        "memfdsecret",
        include_str!("memfdsecret.log"),
        27548,
        ": Unknown shit 100600 (/secretmem (deleted)) (memory of memfd_secret(2), or a mapped file of a kind that cannot be saved)",
    ),
    (
        "unixbacklog",
        include_str!("unixbacklog.log"),
        29877,
        ": unix: Non-empty write queue on an in-flight socket 0x4eb5c",
    ),
    (
        "procdead",
        include_str!("procdead.log"),
        2056,
        ": Can't stat fd 22: No such file or directory (an open file of /proc of a process that has ended)",
    ),
    (
        "ipnetns",
        include_str!("ipnetns.log"),
        0,
        ": mnt: 76:./run/netns/foo doesn't have a proper root mount (a mount of a namespace, or of a part of a file system that is not mounted itself)",
    ),
    ("tcppending", include_str!("tcppending.log"), 31492, ": inet: In-flight connection (l) for 515f5"),
    ("memfdexec", include_str!("memfdexec.log"), 0, ": No entry for reg-file-ID 0xd"),
]
