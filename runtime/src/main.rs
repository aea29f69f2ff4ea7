//! The command line `machinen`.

fn main() -> std::process::ExitCode {
    machinen::cli::main()
}
