//! The descriptors of a twin: which it shares with its original, and which it gets of its own.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
};

use libc::c_long;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{Unborn, memory::Scratch};
use crate::sys::{self, pidfd, ptrace::Tracee};

/// The descriptors of an original that a twin cannot share.
#[derive(Debug)]
pub(super) struct Descriptors {
    /// Those of which the twin gets a new one of the same kind.
    remade: Vec<(i32, OwnedFd)>,
    /// Those that a description of the twin has to replace, with what they lead to, and their flags (O_NONBLOCK or 0).
    to_replace: Vec<(i32, String, OFlag)>,
}

/// Descriptors that one message can carry (SCM_MAX_FD of the kernel).
const IN_MESSAGE: usize = 253;

impl Descriptors {
    pub(super) fn read(pid: i32) -> io::Result<Self> {
        let mut found = Self { remade: Vec::new(), to_replace: Vec::new() };
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(number) = number else { continue };
            let target = fs::read_link(entry.path())?.to_string_lossy().into_owned();
            let info = || fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"));
            match &*target {
                "anon_inode:[eventfd]" => found.remade.push((number, event(&info()?)?)),
                "anon_inode:[signalfd]" => found.remade.push((number, signals(&info()?)?)),
                "anon_inode:[eventpoll]" if !info()?.contains("tfd:") => {
                    found.remade.push((number, sys::twin::epoll()?));
                }
                // It has no state. All other files have one, if only a position and flags.
                "/dev/null" => {}
                _ => found.to_replace.push((number, target, OFlag::from_bits_truncate(flags(&info()?)?))),
            }
        }
        Ok(found)
    }

    /// Gives the twin its own descriptors.
    pub(super) fn replace(
        &self,
        twin: &Unborn,
        scratch: &Scratch<'_>,
        replaced: &[(OwnedFd, Vec<i32>)],
    ) -> io::Result<()> {
        let given = |number| replaced.iter().any(|(_, numbers)| numbers.contains(&number));
        if let Some((number, target, _)) = self.to_replace.iter().find(|(number, ..)| !given(*number)) {
            return Err(io::Error::other(format!(
                "descriptor {number} ({target}) cannot be shared by a twin"
            )));
        }
        // The program has decided whether it waits for them.
        for (fd, numbers) in replaced {
            let flags =
                self.to_replace.iter().find(|(number, ..)| numbers.contains(number)).map(|found| found.2);
            let before = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(before | flags.unwrap_or(OFlag::empty())))?;
        }
        let remade = self.remade.iter().filter(|(number, _)| !given(*number));
        let remade = remade.map(|(number, fd)| (fd.as_raw_fd(), vec![*number], libc::O_CLOEXEC));
        let replaced = replaced.iter().map(|(fd, numbers)| (fd.as_raw_fd(), numbers.clone(), 0));
        let moves: Vec<_> = replaced.chain(remade).collect();
        let call = |number: c_long, arguments: [u64; 6]| twin.first.call(twin.syscall, number, arguments);

        for moves in moves.chunks(IN_MESSAGE) {
            let sent: Vec<RawFd> = moves.iter().map(|(fd, ..)| *fd).collect();
            let received = send(twin.first, twin.syscall, scratch, &sent)?;
            for (fd, (_, targets, flags)) in received.into_iter().zip(moves) {
                for target in targets {
                    call(libc::SYS_dup3, [fd, *target as u64, *flags as u64, 0, 0, 0])?;
                }
                call(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
            }
        }
        Ok(())
    }
}

/// Gives a stopped process descriptors of this one; returns their numbers there. They come by a pair of sockets of its own,
/// one of which this process takes to send by.
pub(super) fn send(
    thread: Tracee,
    syscall: u64,
    scratch: &Scratch<'_>,
    descriptors: &[RawFd],
) -> io::Result<Vec<u64>> {
    let call = |number: c_long, arguments: [u64; 6]| thread.call(syscall, number, arguments);
    let pair = scratch.put(&[0; 8])?;
    let (family, kind) = (libc::AF_UNIX as u64, libc::SOCK_DGRAM as u64);
    call(libc::SYS_socketpair, [family, kind, 0, pair, 0, 0])?;
    let (ours, theirs) = numbers(scratch.memory().read_number(pair)?);
    let pidfd = pidfd::open(thread.pid().cast_unsigned())?;
    let sender = pidfd::duplicate(pidfd.as_fd(), ours)?;
    sys::twin::send(sender.as_fd(), descriptors)?;
    let received = receive(call, scratch, theirs, descriptors.len())?;
    for end in [ours, theirs] {
        call(libc::SYS_close, [end as u64, 0, 0, 0, 0, 0])?;
    }
    Ok(received)
}

/// Has the twin receive a message with as many descriptors; returns their numbers.
fn receive(
    call: impl Fn(c_long, [u64; 6]) -> io::Result<u64>,
    scratch: &Scratch<'_>,
    socket: i32,
    count: usize,
) -> io::Result<Vec<u64>> {
    // struct cmsghdr: length (8), level (4), type (4), then the numbers.
    let length = 16 + 4 * count;
    let control = scratch.put(&vec![0; length.next_multiple_of(8)])?;
    let byte = scratch.put(&[0; 8])?;
    let vector = scratch.put(&[byte.to_ne_bytes(), 1_u64.to_ne_bytes()].concat())?;
    // struct msghdr: name, its length, vector, its length, control, its length, flags.
    let fields = [0, 0, vector, 1, control, length.next_multiple_of(8) as u64, 0];
    let header = scratch.put(&fields.map(u64::to_ne_bytes).concat())?;
    call(libc::SYS_recvmsg, [socket as u64, header, 0, 0, 0, 0])?;
    let mut bytes = vec![0; length];
    scratch.memory().read(control, &mut bytes)?;
    let of_kernel = usize::from_ne_bytes(bytes[..8].try_into().unwrap_or_default());
    if of_kernel != length {
        return Err(io::Error::other("a twin has not received all of its descriptors"));
    }
    let number = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap_or_default());
    Ok(bytes[16..].chunks_exact(4).map(|bytes| number(bytes).into()).collect())
}

/// The two halves of what socketpair(2) writes.
fn numbers(pair: u64) -> (i32, i32) {
    ((pair & 0xffff_ffff) as i32, (pair >> 32) as i32)
}

/// An eventfd with the same counter and flags (proc_pid_fdinfo(5)).
fn event(info: &str) -> io::Result<OwnedFd> {
    let count = u32::try_from(field(info, "eventfd-count:", 16)?).map_err(io::Error::other)?;
    let semaphore = field(info, "eventfd-semaphore:", 10).unwrap_or_default() != 0;
    sys::twin::event(count, flags(info)?, semaphore)
}

fn signals(info: &str) -> io::Result<OwnedFd> {
    sys::twin::signals(field(info, "sigmask:", 16)?, flags(info)?)
}

/// Only whether reads may wait matters: the twin executes no other program.
fn flags(info: &str) -> io::Result<i32> {
    Ok(field(info, "flags:", 8)? as i32 & libc::O_NONBLOCK)
}

fn field(info: &str, name: &str, radix: u32) -> io::Result<u64> {
    let value = info.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    u64::from_str_radix(value.trim(), radix)
        .map_err(|error| io::Error::other(format!("a descriptor has no {name} {error}")))
}
