//! What is opened, and used when it opens.

use std::error::Error;
use std::sync::Arc;

use turret_worker::lens::lora::LoraFolder;
use turret_worker::model::config::ModelConfig;
use turret_worker::model::rope::Frequencies;
use turret_worker::model::single::SingleRow;
use turret_worker::model::tokenizer::Tokenizer;
use turret_worker::model::weights::BaseFolder;

use crate::bound::{message, sound};
use crate::folder::{Folder, fixtures};

/// A base over which lenses are opened.
struct Over {
    row: SingleRow,
    tokenizer: Tokenizer,
}

pub(crate) const BASE: &str = "features-qwen2/model";

thread_local! {
    static OVER: Over = {
        let row = SingleRow::open(&fixtures().join(BASE), None, 16).unwrap();
        let tokenizer = Tokenizer::open(&fixtures().join(BASE), &row.base().layout().config).unwrap();
        Over { row, tokenizer }
    };
}

/// Opens a base and computes with it.
pub(crate) fn open_base(folder: &Folder) -> Option<()> {
    let base = sound(folder, || BaseFolder::open(folder.path(), None))?;
    let config = base.config();
    for rope in std::iter::once(&config.rope).chain(&config.sliding_rope) {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for length in [1, 1 << 24] {
            Frequencies::of(rope).angles(1 << 24, length, &mut cos, &mut sin);
        }
        assert!(cos.iter().chain(&sin).all(|angle| angle.is_finite()), "{rope:?}");
    }
    let mut row = sound(folder, || SingleRow::open(folder.path(), None, 16))?;
    row.compute(&[1, 0, 2], &[]).unwrap();
    Some(())
}

/// Opens a tokenizer and speaks through it.
pub(crate) fn open_tokenizer(folder: &Folder) -> Option<()> {
    let tokenizer = sound(folder, || Tokenizer::open(folder.path(), &config()))?;
    speak(folder, &tokenizer);
    Some(())
}

fn speak(folder: &Folder, tokenizer: &Tokenizer) {
    let text = "The lens turns\u{3000}– “Ünï” 日本語 🙂 <note> a<stop>\n\n  and the base  stays.";
    sound(folder, || tokenizer.encode(text, true).map_err(Named));
    sound(folder, || tokenizer.decode(&[0, 1, 5, 77, 200, 351, 352, u32::MAX], false).map_err(Named));
}

/// An error of a request, which has no file to name.
#[derive(Debug)]
struct Named<E>(E);

impl<E: Error> std::fmt::Display for Named<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`", self.0)
    }
}

impl<E: Error> Error for Named<E> {}

/// Opens a lens and its tokenizer, and computes with it.
pub(crate) fn open_lens(folder: &Folder) -> Option<()> {
    OVER.with(|Over { row, tokenizer }| {
        let lens = sound(folder, || LoraFolder::open(folder.path(), row.base().layout()))?;
        if let Some(tokenizer) = sound(folder, || lens.tokenizer(tokenizer)).flatten() {
            speak(folder, &tokenizer);
        }
        sound(folder, || row.load_lora(folder.path())).map(drop)
    })
}

pub(crate) fn config() -> Arc<ModelConfig> {
    OVER.with(|over| over.row.base().layout().config.clone())
}

/// Opens a base that must be refused, and says why.
pub(crate) fn base_refused(folder: &Folder) -> String {
    let mut why = String::new();
    let opened = sound(folder, || BaseFolder::open(folder.path(), None).inspect_err(|e| why = message(e)));
    assert!(opened.is_none(), "it must be refused");
    why
}

pub(crate) fn lens_refused(folder: &Folder) -> String {
    let mut why = String::new();
    let opened = sound(folder, || {
        OVER.with(|over| LoraFolder::open(folder.path(), over.row.base().layout()))
            .inspect_err(|e| why = message(e))
    });
    assert!(opened.is_none(), "it must be refused");
    why
}

pub(crate) fn tokenizer_refused(folder: &Folder) -> String {
    let mut why = String::new();
    let config = &config();
    let opened = sound(folder, || Tokenizer::open(folder.path(), config).inspect_err(|e| why = message(e)));
    assert!(opened.is_none(), "it must be refused");
    why
}
