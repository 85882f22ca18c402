//! Spans and events as they travel.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use tracing::field::{Field, Value, Visit};
use tracing::{Level, Metadata};

pub(super) const LEVELS: [Level; 5] = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];

/// A level as it travels; 0 is none.
pub(crate) fn number_of(level: Level) -> u8 {
    LEVELS.iter().position(|other| *other == level).map_or(0, |at| at as u8 + 1)
}

/// A span or an event as it travels.
#[derive(Serialize, Deserialize)]
pub(crate) enum Message {
    Span { id: u64, parent: Option<u64>, site: Place, values: Values },
    Record { id: u64, values: Values },
    Event { parent: Option<u64>, site: Place, values: Values },
    Close { id: u64 },
}

impl Message {
    /// Returns `true` if only its time shows to which task it belongs.
    pub(crate) fn is_event_without_span(&self) -> bool {
        matches!(self, Self::Event { parent: None, .. })
    }
}

/// Where in the program it is.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(super) is_span: bool,
    pub(super) name: String,
    pub(super) target: String,
    pub(super) level: u8,
    pub(super) file: Option<String>,
    pub(super) line: Option<u32>,
    pub(super) module: Option<String>,
    pub(super) fields: Vec<String>,
}

impl Place {
    pub(super) fn of(metadata: &Metadata<'_>) -> Self {
        let text = |text: Option<&str>| text.map(str::to_owned);
        Self {
            is_span: metadata.is_span(),
            name: metadata.name().into(),
            target: metadata.target().into(),
            level: number_of(*metadata.level()),
            file: text(metadata.file()),
            line: metadata.line(),
            module: text(metadata.module_path()),
            fields: metadata.fields().iter().map(|field| field.name().into()).collect(),
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) enum Content {
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    /// As its `Debug` has it.
    Shown(String),
}

impl Content {
    pub(super) fn as_value(&self) -> Box<dyn Value + '_> {
        match self {
            Content::Bool(value) => Box::new(*value),
            Content::Signed(value) => Box::new(*value),
            Content::Unsigned(value) => Box::new(*value),
            Content::Float(value) => Box::new(*value),
            Content::Text(text) => Box::new(text.as_str()),
            Content::Shown(text) => Box::new(tracing::field::display(text)),
        }
    }
}

/// By the fields' numbers.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Values(pub(super) Vec<(u8, Content)>);

/// A longer text is cut.
const LONGEST: usize = 2048;

fn cut(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}

impl Values {
    fn add(&mut self, field: &Field, content: Content) {
        if let Ok(index) = field.index().try_into() {
            self.0.push((index, content));
        }
    }
}

impl Visit for Values {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, Content::Shown(cut(format!("{value:?}"))));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, Content::Bool(value));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, Content::Signed(value));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, Content::Unsigned(value));
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, Content::Float(value));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, Content::Text(cut(value.to_owned())));
    }
}
