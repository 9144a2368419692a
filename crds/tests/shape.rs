#[test]
fn print() {
    for c in turret_crds::crds() {
        std::fs::write(format!("/tmp/crd-{}.yaml", c.spec.names.plural), serde_yaml::to_string(&c).unwrap())
            .unwrap();
    }
}
