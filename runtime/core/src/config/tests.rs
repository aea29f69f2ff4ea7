use super::{vm::NO_IO_URING, *};

#[test]
fn the_documented_file_is_the_default() {
    let documented = Config::read(Path::new("../../config/machinen.toml")).unwrap();
    assert_eq!(documented, Config::default());
}

#[test]
fn every_key_is_documented() {
    let text = fs::read_to_string("../../config/machinen.toml").unwrap();
    let all = toml::Table::try_from(Config::default()).unwrap();
    for (section, keys) in &all {
        for key in keys.as_table().unwrap().keys() {
            assert!(text.contains(&format!("\n{key} = ")), "{section}.{key} is not in config/machinen.toml");
        }
    }
}

#[test]
fn a_user_has_directories_of_its_own() {
    let mut config = Config { boot: BootConfig { dir: "/srv/boot".into() }, ..Config::default() };
    config = config.with_directories(Path::new("/run/user/7/machinen"), Path::new("/home/u/machinen"));
    assert_eq!(config.template.dir, Path::new("/run/user/7/machinen/template"));
    assert_eq!(config.pool.dir, Path::new("/run/user/7/machinen/pool"));
    assert_eq!(config.rootdisk.dir, Path::new("/home/u/machinen/rootdisk"));
    assert_eq!(config.boot.dir, Path::new("/srv/boot"));
}

#[test]
fn io_uring_is_turned_off_before_the_users_arguments() {
    let args = |io_uring, args: &str| {
        VmConfig { io_uring, kernel_args: args.into(), ..VmConfig::default() }.all_kernel_args()
    };
    assert_eq!(args(true, ""), "");
    assert_eq!(args(true, "debug"), "debug");
    assert_eq!(args(false, ""), NO_IO_URING);
    assert_eq!(args(false, "debug"), format!("{NO_IO_URING} debug"));
}

#[test]
fn an_unknown_key_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "[vm]\nmemory = 3\n").unwrap();
    let error = machinen_base::error::chain(&Config::read(file.path()).unwrap_err());
    assert!(error.contains("unknown field `memory`"), "{error}");
}

#[test]
fn a_named_file_must_be_there_and_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("nopool.toml");
    let missing = Config::load_named(Some(&file)).unwrap_err();
    assert!(missing.to_string().contains(&file.display().to_string()), "{missing}");
    fs::write(&file, "[pool]\nsize = 0\n").unwrap();
    let config = Config::load_named(Some(&file)).unwrap();
    assert_eq!((config.pool.size, config.file), (0, file));
    let directory = Config::load_named(Some(dir.path())).unwrap_err();
    assert!(directory.to_string().contains(&dir.path().display().to_string()), "{directory}");
    let relative = Config::load_named(Some(Path::new("etc/x.toml"))).unwrap_err();
    assert!(relative.to_string().contains("\"etc/x.toml\" is not absolute"), "{relative}");
}

#[test]
fn pvm_and_its_kernel_come_together() {
    let parse = |vm: &str| Config::parse(&format!("[vm]\n{vm}\n"), Path::new("/etc/x.toml"));
    for text in ["accel = \"pvm\"", "pvm_kernel = \"/k\"", "accel = \"kvm\"\npvm_kernel = \"/k\""] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains("/etc/x.toml needs vm.pvm_kernel"), "{error}");
    }
    parse("accel = \"pvm\"\npvm_kernel = \"/k\"").unwrap();
}

#[test]
fn an_error_of_a_processor_names_the_key() {
    let error = Config::parse("[vm]\ncpu = \"max,pmu=on\"\n", Path::new("/etc/x.toml")).unwrap_err();
    let text = machinen_base::error::chain(&error).to_string();
    assert!(text.contains("cpu = ") && text.contains("max,pmu=on") && text.contains("-cpu help"), "{text}");
}
