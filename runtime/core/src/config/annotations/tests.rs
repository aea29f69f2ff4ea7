//! Tests of the annotations: values, bounds, and later containers of a pod.

use super::*;

/// A configuration that allows every annotation.
fn all_allowed() -> Config {
    let mut config = Config::default();
    config.annotations.allow = names().map(str::to_owned).collect();
    config
}

fn with(name: &str, value: &str) -> Result<Config, AnnotationError> {
    apply(&all_allowed(), &HashMap::from([(name.to_owned(), value.to_owned())]))
}

#[test]
fn by_default_annotations_only_lower_or_are_harmless() {
    let with = |name: &str, value: &str| {
        apply(&Config::default(), &HashMap::from([(format!("{PREFIX}{name}"), value.to_owned())]))
    };
    for (name, value) in [("kernel-args", "quiet"), ("channel", "auto")] {
        assert!(matches!(with(name, value), Err(AnnotationError::NotAllowed { .. })), "{name}");
    }
    for (name, most, more, key) in [
        ("memory-ceiling", "2048", "2049", "annotations.max_memory_mib"),
        ("vcpus", "8", "9", "annotations.max_vcpus"),
        ("rootdisk-size", "16384", "16385", "annotations.max_rootdisk_size_mib"),
    ] {
        with(name, most).unwrap();
        let error = with(name, more).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        let text = error.to_string();
        assert!(text.contains(key) && text.contains(name) && text.contains(most), "{text}");
    }
}

#[test]
fn what_the_configuration_gives_every_container_an_annotation_may_ask_for() {
    let mut config = Config::default();
    (config.vm.vcpus, config.vm.memory_mib) = (16, 8192);
    for (name, value) in [("vcpus", "16"), ("memory-ceiling", "8192")] {
        apply(&config, &HashMap::from([(format!("{PREFIX}{name}"), value.to_owned())])).unwrap();
    }
}

#[test]
fn vms_that_annotations_shape_get_no_template() {
    let mode = |config: &Config, name: &str, value: &str| {
        let annotations = HashMap::from([(format!("{PREFIX}{name}"), value.to_owned())]);
        apply(config, &annotations).unwrap().template.mode
    };
    let mut config = Config::default();
    assert_eq!(mode(&config, "vcpus", "1"), TemplateMode::Use);
    assert_eq!(mode(&config, "lazy", "true"), TemplateMode::Auto, "it does not shape the VM");
    config.annotations.templates = true;
    assert_eq!(mode(&config, "vcpus", "1"), TemplateMode::Auto);
    (config.annotations.templates, config.template.mode) = (false, TemplateMode::Off);
    assert_eq!(mode(&config, "vcpus", "1"), TemplateMode::Off);
}

#[test]
fn each_key_reaches_its_setting() {
    assert_eq!(with("io.machinen.memory-ceiling", "900").unwrap().vm.memory_mib, 900);
    assert_eq!(with("io.machinen.vcpus", "3").unwrap().vm.vcpus, 3);
    assert_eq!(with("io.machinen.rootdisk-size", "4096").unwrap().rootdisk.writable_size_mib, 4096);
    assert_eq!(with("io.machinen.kernel-args", "a=b").unwrap().vm.kernel_args, "a=b");
    assert_eq!(with("io.machinen.channel", "serial").unwrap().vm.channel, ChannelMode::Serial);
    assert!(with("io.machinen.lazy", "true").unwrap().restore.lazy);
    assert_eq!(with("io.machinen.tcp", "close").unwrap().restore.tcp, TcpMode::Close);
    assert!(with("io.machinen.network", "pasta").unwrap().network.outside);
    let network = with("io.machinen.network", "routed").unwrap().network;
    assert!(network.routed && !network.outside, "{network:?}");
    let network = with("io.machinen.ports", "8080:80,53:53/udp").unwrap().network;
    assert!(network.outside && network.ports.len() == 2, "{network:?}");
}

#[test]
fn annotations_without_the_prefix_are_ignored() {
    assert_eq!(with("io.kubernetes.cri.sandbox-id", "x").unwrap(), all_allowed());
}

#[test]
fn errors_name_the_valid_values() {
    for (name, value) in [
        ("io.machinen.memory-ceiling", "lots"),
        ("io.machinen.memory-ceiling", "12"),
        ("io.machinen.vcpus", "0"),
        ("io.machinen.rootdisk-size", "-1"),
        ("io.machinen.kernel-args", "a\nb"),
        ("io.machinen.channel", "pigeon"),
        ("io.machinen.tcp", "open"),
        ("io.machinen.network", "host"),
        ("io.machinen.ports", "80"),
    ] {
        let error = with(name, value).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("it takes"), "{error}");
    }
}

#[test]
fn unknown_and_disallowed_keys_are_refused() {
    assert!(matches!(with("io.machinen.memory", "1"), Err(AnnotationError::Unknown { .. })));
    let mut config = Config::default();
    config.annotations.allow.clear();
    let annotations = HashMap::from([("io.machinen.vcpus".to_owned(), "1".to_owned())]);
    assert_eq!(apply(&config, &annotations), Err(AnnotationError::NotAllowed { name: "vcpus" }));
}

#[test]
fn copies_are_not_for_pods_unless_the_configuration_says_so() {
    let mut annotations = HashMap::from([("io.machinen.copy-mount".to_owned(), "/srv:/data".to_owned())]);
    let applied = apply(&Config::default(), &annotations).unwrap();
    assert_eq!(applied.rootdisk.copies.len(), 1);
    assert_eq!(applied.rootdisk.copy_size_mib, 4096);
    for pod in ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"] {
        let mut annotations = annotations.clone();
        annotations.insert(pod.to_owned(), "container".to_owned());
        let error = apply(&Config::default(), &annotations).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("rootdisk.copies_in_pods"), "{error}");
        let mut config = Config::default();
        config.rootdisk.copies_in_pods = true;
        apply(&config, &annotations).unwrap();
    }
    annotations.insert("io.machinen.copy-mount-size".to_owned(), "16385".to_owned());
    let error = apply(&Config::default(), &annotations).unwrap_err();
    assert!(error.to_string().contains("max_rootdisk_size_mib"), "{error}");
    for (value, words) in [("data:/data", "two absolute paths"), ("/a:/x,/b:/x", "whose destinations differ")]
    {
        let annotations = HashMap::from([("io.machinen.copy-mount".to_owned(), value.to_owned())]);
        let error = apply(&Config::default(), &annotations).unwrap_err();
        assert!(error.to_string().contains(words) && error.to_string().contains(value), "{error}");
    }
}

/// The VM of a container with the default configuration.
fn running() -> VmSpec {
    let accel = machinen_vm::accel::Accelerator::Kvm;
    VmSpec {
        id: "pod".into(),
        qemu: "qemu".into(),
        accel,
        cpu: machinen_vm::CpuModel::default(),
        kernel_digest: String::new(),
        nested_kvm: false,
        pmu: false,
        memory_mib: 512,
        vcpus: 2,
        kernel: "vmlinux".into(),
        image: "guest.img".into(),
        kernel_args: String::new(),
        channel: ChannelKind::Serial,
        nics: 1,
        vhost_nics: 0,
        twins: false,
        hostname: "pod".into(),
        boot_timeout: std::time::Duration::from_secs(1),
        qemu_files: Vec::new(),
        tenant: String::new(),
        keep_console: false,
    }
}

fn join(name: &str, value: &str) -> Result<(), AnnotationError> {
    join_vm_of(&Config::default(), name, value)
}

fn join_vm_of(first: &Config, name: &str, value: &str) -> Result<(), AnnotationError> {
    let annotations = HashMap::from([(format!("{PREFIX}{name}"), value.to_owned())]);
    check_join(&apply(&all_allowed(), &annotations)?, &annotations, &first.vm, &running())
}

#[test]
fn what_the_first_container_asked_for_is_never_refused() {
    let mut first = Config::default();
    // Its limits have made the VM smaller.
    first.vm.vcpus = 4;
    join_vm_of(&first, "vcpus", "4").unwrap();
    join_vm_of(&first, "vcpus", "2").unwrap();
    join_vm_of(&first, "vcpus", "3").unwrap_err();
}

#[test]
fn a_later_container_may_not_ask_for_another_vm() {
    for (name, value, has) in [
        ("memory-ceiling", "900", "512 MiB"),
        ("vcpus", "4", "with 2;"),
        ("kernel-args", "debug", "\"\""),
        ("channel", "vsock", "serial"),
    ] {
        let error = join(name, value).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        let text = error.to_string();
        for word in [name, value, has, "first container"] {
            assert!(text.contains(word), "{text}");
        }
    }
}

#[test]
fn a_later_container_joins_with_what_its_vm_has() {
    for (name, value) in [
        ("memory-ceiling", "512"),
        ("vcpus", "2"),
        ("kernel-args", ""),
        ("channel", "serial"),
        ("channel", "auto"),
    ] {
        join(name, value).unwrap();
    }
    let joined = check_join(&Config::default(), &HashMap::new(), &VmConfig::default(), &running());
    assert_eq!(joined, Ok(()), "no annotation asks for nothing");
}

#[test]
fn annotations_of_the_container_never_prevent_a_join() {
    for (name, value) in [
        ("rootdisk-size", "64"),
        ("pre-dump", "true"),
        ("verify", "restore"),
        ("lazy", "true"),
        ("tcp", "close"),
    ] {
        join(name, value).unwrap();
    }
}
