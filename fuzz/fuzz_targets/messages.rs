//! The agent's answers, and what the host parses of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machinen::pod::stats::{FILES, Stats};
use machinen_protocol::{
    api,
    preamble::{ANSWER_LEN, Answer, PREAMBLE_LEN, Preamble},
};
use protobuf::Message;

fuzz_target!(|data: &[u8]| {
    let Some((&which, rest)) = data.split_first() else { return };
    match which % 8 {
        0 => drop(api::ConfigureResponse::parse_from_bytes(rest)),
        1 => drop(api::CreateContainerResponse::parse_from_bytes(rest)),
        2 => drop(api::WaitProcessResponse::parse_from_bytes(rest)),
        3 => drop(api::WaitOutOfMemoryResponse::parse_from_bytes(rest)),
        4 => {
            if let Ok(answer) = api::ReadCgroupResponse::parse_from_bytes(rest) {
                drop(Stats::read(&answer.files));
            }
        }
        5 => {
            let Some((&which, text)) = rest.split_first() else { return };
            let file = api::CgroupFile {
                name: FILES[usize::from(which) % FILES.len()].to_owned(),
                content: String::from_utf8_lossy(text).into_owned(),
                ..Default::default()
            };
            let stats = Stats::read(&[file]);
            assert!(stats.io.len() <= 512);
        }
        6 => {
            if let Some(Ok(preamble)) = rest.first_chunk::<PREAMBLE_LEN>().map(Preamble::decode) {
                assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
            }
        }
        _ => {
            if let Some(Ok(answer)) = rest.first_chunk::<ANSWER_LEN>().map(Answer::decode) {
                assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
            }
        }
    }
});
