//! Generates the ttrpc bindings of `proto/inspection.proto`; the generator is pure Rust and needs no `protoc`.

use std::{env, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("inspection");
    fs::create_dir_all(&out).expect("OUT_DIR is writable");
    Codegen::new()
        .inputs(["proto/inspection.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .out_dir(&out)
        .run()
        .expect("proto/inspection.proto compiles");
    // The generated files open with inner attributes, which `include!` refuses: they are included as modules.
    fs::write(out.join("api.rs"), "pub mod inspection;\npub mod inspection_ttrpc;\n")
        .expect("OUT_DIR is writable");
}
