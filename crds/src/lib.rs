//! The contract between the parts of Turret.
