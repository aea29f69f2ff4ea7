//! Random sequences of verbs for one container, each compared with a model of what runc's users expect: which verbs succeed
//! in which state, with which text they are refused, and which state follows. The VMs are fake, so that a sequence takes
//! seconds.

use anyhow::{Context, Result};
use machinen_integration::{fake::FakeVmm, oci::Oci, runtime::Runtime};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

/// The container.
const ID: &str = "follows-the-model";
/// How many sequences one run of the test makes, and how long they are.
const SEQUENCES: u32 = 40;
const LENGTH: usize = 14;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Absent,
    Created,
    Running,
    Paused,
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verb {
    Create,
    Start,
    Kill,
    Delete,
    DeleteForce,
    Pause,
    Resume,
    Exec,
    Secret,
}

/// What a verb does: the state after it, or the text of its error.
type Outcome = std::result::Result<State, &'static str>;

const MISSING: &str = "does not exist";

fn model(state: State, verb: Verb) -> Outcome {
    use State::{Absent, Created, Paused, Running, Stopped};
    match (verb, state) {
        (Verb::DeleteForce, _) => Ok(Absent),
        (Verb::Create, Absent) => Ok(Created),
        (Verb::Create, _) => Err("already exists"),
        (Verb::Secret, Absent) => Err("there is no container"),
        (_, Absent) => Err(MISSING),
        (Verb::Start, Created) => Ok(Running),
        (Verb::Start, Running | Paused) => Err("cannot start an already running container"),
        (Verb::Start, Stopped) => Err("cannot start a container that has stopped"),
        (Verb::Kill, Stopped) => Err("container not running"),
        (Verb::Kill, _) => Ok(Stopped),
        (Verb::Delete, Created | Stopped) => Ok(Absent),
        (Verb::Delete, Running | Paused) => Err("that is not stopped"),
        (Verb::Pause, Running) => Ok(Paused),
        (Verb::Pause, Created) => Err("has not been started"),
        (Verb::Pause, Paused | Stopped) => Err("container not running"),
        (Verb::Resume, Paused) => Ok(Running),
        (Verb::Resume, _) => Err("container not paused"),
        (Verb::Exec | Verb::Secret, Created | Running) => Ok(state),
        (Verb::Exec, Paused) => Err("cannot exec in a paused container"),
        (Verb::Exec, Stopped) => Err("cannot exec in a stopped container"),
        (Verb::Secret, Paused) => Err("is paused"),
        (Verb::Secret, Stopped) => Err(""),
    }
}

impl State {
    /// As the verb `state` prints it.
    fn name(self) -> &'static str {
        match self {
            Self::Absent => "",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

fn verb() -> impl Strategy<Value = Verb> {
    prop_oneof![
        4 => Just(Verb::Create),
        4 => Just(Verb::Start),
        1 => Just(Verb::Kill),
        1 => Just(Verb::Delete),
        1 => Just(Verb::DeleteForce),
        3 => Just(Verb::Pause),
        2 => Just(Verb::Resume),
        2 => Just(Verb::Exec),
        1 => Just(Verb::Secret),
    ]
}

#[test]
fn verbs_follow_the_model() {
    let oci = Oci::start(Runtime::Machinen).unwrap_or_else(|error| panic!("{error:#}"));
    random_sequences(&oci).unwrap_or_else(|error| panic!("{error:#}"));
}

fn random_sequences(oci: &Oci) -> Result<()> {
    let fake = FakeVmm::start_on(oci.host())?;
    oci.set_up(&fake.setup())?;
    oci.bundle(ID, &["sleep", "1000"], |_| {})?;
    let before = oci.inventory()?;
    let config =
        Config { cases: SEQUENCES, failure_persistence: None, max_shrink_iters: 16, ..Config::default() };
    let seen = std::cell::RefCell::new(std::collections::BTreeSet::new());
    // Chance alone does not lead to each state each time.
    let each_state =
        [Verb::Create, Verb::Start, Verb::Pause, Verb::Exec, Verb::Resume, Verb::Kill, Verb::Delete];
    follow(oci, &each_state, &mut seen.borrow_mut())?;
    fake.settle()?;
    let outcome = TestRunner::new(config).run(&prop::collection::vec(verb(), 1..=LENGTH), |verbs| {
        let followed = follow(oci, &verbs, &mut seen.borrow_mut());
        // Also for the next sequence, after one that has failed.
        let removed = oci.ok(&["delete", "--force", ID]).map(drop).and_then(|()| fake.settle());
        followed.and(removed).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    outcome.map_err(|error| anyhow::anyhow!("{error}")).context("a sequence failed")?;
    oci.settle(&before)?;
    let seen = seen.into_inner();
    println!("{} pairs of state and verb were seen", seen.len());
    Ok(())
}

fn follow(oci: &Oci, verbs: &[Verb], seen: &mut std::collections::BTreeSet<(State, Verb)>) -> Result<()> {
    let mut state = State::Absent;
    for verb in verbs {
        seen.insert((state, *verb));
        let expected = model(state, *verb);
        run(oci, *verb, expected).with_context(|| format!("{verb:?} in {state:?}, of {verbs:?}"))?;
        state = expected.unwrap_or(state);
        let shown = match state {
            State::Absent => oci.fails(&["state", ID], 1, MISSING),
            _ => oci.has_status(ID, state.name()),
        };
        shown.with_context(|| format!("after {verb:?}, of {verbs:?}"))?;
    }
    Ok(())
}

fn run(oci: &Oci, verb: Verb, expected: Outcome) -> Result<()> {
    let dir = oci.bundle_dir(ID);
    let args: &[&str] = match verb {
        // Its streams are the container's.
        Verb::Create if expected.is_ok() => return oci.create(ID).map(drop),
        Verb::Create => &["create", "--bundle", &dir, ID],
        Verb::Start => &["start", ID],
        Verb::Kill => &["kill", ID, "KILL"],
        Verb::Delete => &["delete", ID],
        Verb::DeleteForce => &["delete", "--force", ID],
        Verb::Pause => &["pause", ID],
        Verb::Resume => &["resume", ID],
        Verb::Exec => &["exec", ID, "true"],
        Verb::Secret => &["secret", ID, "A=1"],
    };
    match expected {
        Ok(State::Stopped) => {
            let pid = oci.pid(ID)?;
            oci.ok(args)?;
            oci.wait(pid)
        }
        Ok(_) => oci.ok(args).map(drop),
        Err(text) => oci.fails(args, if verb == Verb::Exec { 255 } else { 1 }, text),
    }
}
