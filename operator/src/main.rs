//! Turret.
fn main() {}
