//! The command line `machinen`.

fn main() -> std::process::ExitCode {
    machinen::template::main_if_asked();
    machinen::cli::main()
}
