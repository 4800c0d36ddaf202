//! Row of a table of keys: the spelling of a key, the form of its value, its help, the disks that it applies to, and a
//! function that stores a value.
//!
//! A key that works in this build has such a function. A key that does not work yet has none, and [`Key::available`] reports
//! that. What the function stores a value in is not known here.

use super::outcome::UsageError;
use super::scheme;
use super::values::{self, Value};

/// One row of a table of keys: everything the parser and the help need to know about a key. `S` stores the values.
#[derive(Debug)]
pub(super) struct Key<S: 'static> {
    /// Text before the `=`.
    pub(super) name: &'static str,
    /// Other accepted spellings.
    pub(super) aliases: &'static [&'static str],
    /// Section of the help that lists the key.
    pub(super) group: Group,
    /// Groups whose sources accept the key too.
    also: &'static [Group],
    /// Form of the value.
    pub(super) kind: ValueKind,
    /// Explanation in the help.
    pub(super) help: &'static str,
    /// True if the key may be given more than once for a disk. All its values apply.
    pub(super) repeats: bool,
    /// Disks that the key applies to.
    pub(super) scope: Scope,
    /// True if the value must not show in a message.
    pub(super) secret: bool,
    /// Keys that make one choice together with this one.
    pub(super) choice: Option<Choice>,
    /// Function that stores the value. `None`: the back end or feature of the key is not in this build.
    apply: Option<Apply<S>>,
}

/// Sections of the help, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// Keys for every kind of source.
    Every,
    /// Images on this machine.
    Local,
    /// ESXi and vCenter.
    VMware,
    /// VMware's library.
    Vddk,
    /// Creation of disks.
    Create,
    /// Additional files in the mount for each disk.
    Views,
    /// NBD servers.
    Nbd,
}

/// Form of a value.
#[derive(Debug, Clone, Copy)]
pub(super) enum ValueKind {
    /// A boolean ([`values::boolean`]).
    Bool,
    /// A size in bytes ([`values::size`]).
    Size,
    /// A time in whole seconds.
    Seconds,
    /// A whole number.
    Count,
    /// The path of a file or folder.
    Path,
    /// A path, or this word instead of one.
    PathOr(&'static str),
    /// A number, or a name for one. Holds the placeholder for the help.
    Named(&'static str),
    /// Any text that the key checks itself.
    Text,
    /// Usually one of these words. The key itself checks the text, and knows other spellings.
    Known(&'static [&'static str]),
    /// One of a fixed set of words.
    OneOf {
        /// Words that work in this build.
        words: &'static [&'static str],
        /// Words that are not in this build yet.
        later: &'static [&'static str],
    },
}

/// Disks that a key applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// The key names a source, and so starts another disk.
    Starts,
    /// The key applies to one disk. Before the first source it is accepted if there is only one disk.
    OneDisk,
    /// The key applies to all disks before the first source, and to one disk after its source.
    Common,
}

/// Keys that make one choice together: one of them for a disk replaces the common values of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// The trust in a server.
    Trust,
    /// The owner of a disk that VDDK opens.
    Owner,
    /// The address of an NBD server.
    Address {
        /// True if `port=` is a part of the address.
        has_port: bool,
    },
}

/// Function that stores a value. Its error is the reason why the value is invalid.
type Apply<S> = fn(&mut S, &Value<'_>) -> Result<(), String>;

impl Group {
    pub(super) const ALL: [Self; 7] = [
        Self::Every,
        Self::Local,
        Self::VMware,
        Self::Vddk,
        Self::Create,
        Self::Views,
        Self::Nbd,
    ];

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Every => "Every source",
            Self::Local => "Local files",
            Self::VMware => "VMware",
            Self::Vddk => "VDDK",
            Self::Create => "Created disks",
            Self::Views => "Views",
            Self::Nbd => "NBD",
        }
    }
}

impl ValueKind {
    /// Returns a [`Self::OneOf`] whose words all work in this build.
    pub(super) const fn one_of(words: &'static [&'static str]) -> Self {
        Self::OneOf { words, later: &[] }
    }

    /// Returns the placeholder for the value in the help and in messages.
    pub(super) fn placeholder(self) -> String {
        match self {
            Self::Bool => "BOOL".into(),
            Self::Size => "SIZE".into(),
            Self::Seconds => "SECONDS".into(),
            Self::Count => "N".into(),
            Self::Path => "PATH".into(),
            Self::PathOr(word) => format!("PATH|{word}"),
            Self::Named(what) => what.into(),
            Self::Text => "TEXT".into(),
            Self::Known(_) => "TYPE".into(),
            Self::OneOf { words, .. } => words.join("|"),
        }
    }

    /// Returns a description of the TOML value that a config file must have, for error messages.
    pub(super) fn in_toml(self) -> String {
        match self {
            Self::Bool => "true or false".into(),
            Self::Size => "a text such as \"64M\", or a number of bytes".into(),
            Self::Seconds | Self::Count => "a whole number".into(),
            Self::Path => "a path in quotes".into(),
            Self::PathOr(word) => format!("a path or \"{word}\", in quotes"),
            Self::Named(_) => "a whole number, or a name in quotes".into(),
            Self::Text | Self::Known(_) => "a text in quotes".into(),
            Self::OneOf { words, .. } => words
                .iter()
                .map(|word| format!("\"{word}\""))
                .collect::<Vec<_>>()
                .join(" or "),
        }
    }
}

impl<S> Key<S> {
    /// Creates a row for a key that works in this build.
    pub(super) const fn ready(
        name: &'static str,
        group: Group,
        kind: ValueKind,
        help: &'static str,
        apply: Apply<S>,
    ) -> Self {
        Self {
            apply: Some(apply),
            ..Self::later(name, group, kind, help)
        }
    }

    /// Creates a row for a key that is not in this build yet.
    pub(super) const fn later(name: &'static str, group: Group, kind: ValueKind, help: &'static str) -> Self {
        Self {
            name,
            aliases: &[],
            group,
            also: &[],
            kind,
            help,
            repeats: false,
            scope: Scope::Common,
            secret: false,
            choice: None,
            apply: None,
        }
    }

    pub(super) const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }

    pub(super) const fn alias(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    pub(super) const fn also(mut self, groups: &'static [Group]) -> Self {
        self.also = groups;
        self
    }

    pub(super) const fn choice(mut self, choice: Choice) -> Self {
        self.choice = Some(choice);
        self
    }

    pub(super) const fn repeats(mut self) -> Self {
        self.repeats = true;
        self
    }

    pub(super) const fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Stores `value` in `settings`.
    ///
    /// Fails if the value is invalid, or if the key or the word is not in this build yet.
    pub(super) fn apply(&self, settings: &mut S, value: &Value<'_>) -> Result<(), UsageError> {
        let apply = self.available()?;
        if let ValueKind::OneOf { words, later } = self.kind {
            match value.to_str() {
                Some(word) if words.contains(&word) => {}
                Some(word) if later.contains(&word) => {
                    return Err(UsageError::not_yet(format_args!("{}={word}", self.name)));
                }
                _ => return Err(self.wrong(value, &format!("must be {}", words.join(" or ")))),
            }
        }
        apply(settings, value).map_err(|reason| self.wrong(value, &reason))
    }

    /// Returns the function that stores a value. Fails if the key is not in this build yet.
    pub(super) fn available(&self) -> Result<Apply<S>, UsageError> {
        self.apply
            .ok_or_else(|| UsageError::not_yet(format_args!("{}=", self.name)))
    }

    /// Creates the error for an invalid value, which it prints unless it is secret or an address that holds a login.
    fn wrong(&self, value: &Value<'_>, reason: &str) -> UsageError {
        match self.secret || scheme::has_login(value) {
            true => UsageError::of(self.name, format_args!(": {reason}")),
            false => UsageError::of(self.name, format_args!("{}: {reason}", values::display(value))),
        }
    }

    /// Returns true if sources of `group` accept the key.
    pub(super) fn fits(&self, group: Group) -> bool {
        self.group == group || self.group == Group::Every || self.also.contains(&group)
    }

    /// Returns the explanation for the help and the manual. It starts with the usual words of the value, if there are some.
    pub(super) fn explanation(&self) -> String {
        let repeats = if self.repeats { " (repeatable)" } else { "" };
        match self.kind {
            ValueKind::Known(words) => format!("{}; {}{repeats}", words.join(", "), self.help),
            _ => format!("{}{repeats}", self.help),
        }
    }

    /// Returns true if the key works in this build.
    pub(super) fn is_ready(&self) -> bool {
        self.apply.is_some()
    }
}
