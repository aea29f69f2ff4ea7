//! Generates the ttrpc bindings of `proto/inspection.proto` and `proto/secrets.proto`, and the messages of
//! `proto/pod_sandbox.proto` and `proto/runtime_options.proto`; the generator is pure Rust and needs no `protoc`.

use std::{env, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo::rerun-if-changed=proto");
    generate("inspection", "pub mod inspection;\npub mod inspection_ttrpc;\n");
    generate("secrets", "pub mod secrets;\npub mod secrets_ttrpc;\n");
    generate("pod_sandbox", "pub mod pod_sandbox;\n");
    generate("runtime_options", "pub mod runtime_options;\n");
}

/// The generated files open with inner attributes, which `include!` refuses: they are included as these modules.
fn generate(name: &str, modules: &str) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(name);
    fs::create_dir_all(&out).expect("OUT_DIR is writable");
    Codegen::new()
        .inputs([format!("proto/{name}.proto")])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .out_dir(&out)
        .run()
        .expect("the file compiles");
    fs::write(out.join("api.rs"), modules).expect("OUT_DIR is writable");
}
