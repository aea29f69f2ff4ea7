//! The parts of a random program.

use proptest::{bool, collection::vec, option, prelude::*};

/// A process of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Init,
    Exec(usize),
}

/// How many processes a program may add to the container.
pub(super) const EXECS: usize = 3;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Create,
    Start(Target),
    Exec(usize),
    Resize(Target),
    Signal(Target, u32),
    Pause,
    Resume,
    Update,
    Checkpoint,
    State(Target),
    Pids,
    Stats,
    Delete(Target),
}

/// The requests of one client, in order, each with a delay in microseconds before it.
pub(super) type Lane = Vec<(u64, Request)>;

/// A container with clients that are independent of each other.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// The container runs before the clients start.
    pub(super) started: bool,
    /// Bytes that each process is given as its input before its end; None: its input stays open.
    pub(super) init_input: Option<usize>,
    pub(super) exec_input: [usize; EXECS],
    pub(super) lanes: Vec<Lane>,
}

pub(super) fn program() -> impl Strategy<Value = Program> {
    (
        bool::weighted(0.8),
        // Most often a container that stays.
        option::weighted(0.2, size()),
        [size(), size(), size()],
        vec(lane(), 2..5),
    )
        .prop_map(|(started, init_input, exec_input, lanes)| Program {
            started,
            init_input,
            exec_input,
            lanes,
        })
}

/// Nothing, little, or more than a pipe holds.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![Just(0), 1..100_usize, 60_000..300_000_usize]
}

fn lane() -> impl Strategy<Value = Lane> {
    // A client that acts as real clients do, or one that does anything.
    prop_oneof![2 => usual(), 1 => vec((pause(), request()), 1..10)]
}

/// Adds a process and starts it, with something in between or after.
fn usual() -> impl Strategy<Value = Lane> {
    (0..EXECS, vec((pause(), request()), 0..4), pause(), pause()).prop_map(|(exec, mut between, one, two)| {
        let after = between.split_off(between.len() / 2);
        let start = [(two, Request::Start(Target::Exec(exec)))];
        [(one, Request::Exec(exec))].into_iter().chain(between).chain(start).chain(after).collect()
    })
}

fn pause() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(0), 1 => 0..20_000_u64]
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![1 => Just(Target::Init), 3 => (0..EXECS).prop_map(Target::Exec)]
}

fn request() -> impl Strategy<Value = Request> {
    use Request as R;
    let signal = prop_oneof![3 => Just(15_u32), 1 => Just(9)];
    prop_oneof![
        1 => Just(R::Create),
        3 => target().prop_map(R::Start),
        4 => (0..EXECS).prop_map(R::Exec),
        2 => target().prop_map(R::Resize),
        2 => (target(), signal).prop_map(|(target, signal)| R::Signal(target, signal)),
        2 => Just(R::Pause),
        2 => Just(R::Resume),
        1 => Just(R::Update),
        1 => Just(R::Checkpoint),
        2 => target().prop_map(R::State),
        1 => Just(R::Pids),
        1 => Just(R::Stats),
        3 => (0..EXECS).prop_map(|exec| R::Delete(Target::Exec(exec))),
        1 => Just(R::Delete(Target::Init)),
    ]
}
