//! What a rendering may cost, over and above its steps.
//!
//! minijinja's fuel counts steps, but one step may join two texts of any length or compare two lists of any depth. So whatever
//! reads or writes in proportion to its operands pays here for what it touches, before it does so where that is
//! possible. What is spent is never given back: it bounds the memory that a rendering takes as well as its time.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

/// Bytes that a rendering may read and write in all.
pub const MAX_BYTES: usize = 128 << 20;
/// How deeply values may be nested: deeper than any JSON that serde reads, shallow enough for any stack.
const MAX_DEPTH: usize = 200;
/// What a value costs besides its text.
const VALUE_BYTES: usize = 32;

struct Budget {
    left: usize,
}

impl Budget {
    fn spend(&mut self, bytes: usize) -> Result<(), Error> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            refused(format!("it takes more than its {} MiB of texts and lists", MAX_BYTES >> 20))
        })?;
        Ok(())
    }

    fn weigh(&mut self, value: &Value, depth: usize, visit: Visit) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refused(format!("values are nested more than {MAX_DEPTH} deep")));
        }
        match (value.kind(), visit) {
            (ValueKind::String | ValueKind::Bytes, Visit::Read) => {
                self.spend(VALUE_BYTES + value.as_bytes().map_or(0, <[u8]>::len))
            }
            (ValueKind::Map, Visit::Keep) if is_namespace(value) => {
                Err(refused("a namespace cannot be kept in another value".into()))
            }
            (ValueKind::Map, _) => {
                self.spend(VALUE_BYTES)?;
                for key in value.try_iter()? {
                    self.weigh(&key, depth + 1, visit)?;
                    self.weigh(&value.get_item(&key)?, depth + 1, visit)?;
                }
                Ok(())
            }
            (ValueKind::Seq | ValueKind::Iterable, _) => {
                self.spend(VALUE_BYTES)?;
                value.try_iter()?.try_for_each(|item| self.weigh(&item, depth + 1, visit))
            }
            _ => self.spend(1),
        }
    }
}

/// Why a value is weighed.
#[derive(Clone, Copy, PartialEq)]
enum Visit {
    /// All of it is about to be read.
    Read,
    /// It is about to become part of another.
    Keep,
}

/// Pays for `bytes`.
pub fn spend(state: &mut State, bytes: usize) -> Result<(), Error> {
    budget(state).spend(bytes)
}

/// Pays for all that `value` contains.
pub fn weigh(state: &mut State, value: &Value) -> Result<(), Error> {
    budget(state).weigh(value, 0, Visit::Read)
}

/// Pays for a value without what its items contain.
pub fn skim(state: &mut State, value: &Value) -> Result<(), Error> {
    let bytes = match value.as_bytes() {
        Some(bytes) => bytes.len(),
        None => value.len().unwrap_or(0).saturating_mul(VALUE_BYTES),
    };
    budget(state).spend(VALUE_BYTES + bytes)
}

/// Whether `value` may become part of another: neither deep enough to exhaust a stack, nor a namespace, which could then
/// contain itself and would never be freed.
pub fn keep(state: &mut State, value: &Value) -> Result<(), Error> {
    budget(state).weigh(value, 0, Visit::Keep)
}

fn budget<'s>(state: &'s mut State) -> &'s mut Budget {
    state.get_or_insert_extension_with(|| Budget { left: MAX_BYTES })
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// The error of a template that asks for too much.
pub fn refused(why: String) -> Error {
    Error::new(ErrorKind::OutOfFuel, why)
}

/// Text that is paid for as it is written.
pub struct PaidText<'s, 't, 'e> {
    state: &'s mut State<'t, 'e>,
    bytes: Vec<u8>,
}

impl<'s, 't, 'e> PaidText<'s, 't, 'e> {
    pub fn new(state: &'s mut State<'t, 'e>) -> Self {
        Self { state, bytes: Vec::new() }
    }

    pub fn into_string(self) -> String {
        String::from_utf8(self.bytes).expect("only whole strings and JSON are written")
    }
}

impl std::io::Write for PaidText<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        spend(self.state, bytes.len()).map_err(std::io::Error::other)?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
