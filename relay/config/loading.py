"""Load the configuration from file, environment and command line.

Every error is a ConfigError of one line that names the source (file and section, environment
variable or option), the setting and the allowed values, but never the value of a secret.

Each source overrides the ones before it: defaults, configurations of other servers (`imported`),
file, environment `RELAY_<SECTION>_<KEY>`, `--set`, flags. A section [namespace:NAME] inherits from
[namespace]. Subsections of a protocol, [protocol:PROTOCOL:NAME], inherit nothing and become a
field of [protocol:PROTOCOL].

A setting that earlier versions had (`Section.removed`) is accepted in all sources, with a note.
"""

from __future__ import annotations

import configparser
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr, ValidationError

from relay.config.imported import ImportedConfiguration
from relay.config.ini_text import allowed, env_name
from relay.config.settings import (
    ConsoleSettings,
    HubSettings,
    JobSettings,
    JournalSettings,
    JwtSettings,
    LogSettings,
    MetricsSettings,
    NamespaceSettings,
    NodeSettings,
    PublishSettings,
    RedisSettings,
    RightsSettings,
    Section,
    ServerSettings,
    StreamSettings,
    TracingSettings,
)
from relay.core.errors import ConfigError
from relay.core.model import Channel, namespace_of, parse_channel

SECTIONS: Mapping[str, type[Section]] = {
    "node": NodeSettings,
    "server": ServerSettings,
    "log": LogSettings,
    "journal": JournalSettings,
    "redis": RedisSettings,
    "stream": StreamSettings,
    "hub": HubSettings,
    "rights": RightsSettings,
    "jwt": JwtSettings,
    "metrics": MetricsSettings,
    "tracing": TracingSettings,
    "console": ConsoleSettings,
    "jobs": JobSettings,
    "publish": PublishSettings,
    "namespace": NamespaceSettings,
}
# Flags of `serve` that set a setting. --insecure is not a setting, so that no file can enable it.
FLAGS: Mapping[str, tuple[str, str]] = {
    "host": ("server", "host"),
    "port": ("server", "port"),
    "workers": ("node", "workers"),
    "redis": ("redis", "url"),
}

# Kubernetes and Docker set these for services and containers named relay or relay-NAME.
_SERVICE_LINK = re.compile(
    r"RELAY_(PORT|(\w+_)?"
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?))"
)
# A service named relay-server sets RELAY_SERVER_PORT, which is a setting's name, to such a value.
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d+")
# Placeholders in the documentation and in other projects' examples.
_PLACEHOLDER = re.compile(
    r"(?is)\s*(the (one|secret|key) that .*|the .* key of .*|jwt_private_key\b.*"
    r"|<[^<>]*>|\$\{.*\}|change[ _-]?me.*"
    r"|(your|replace|insert)[ _-].*)\s*"
)
# Sections that a reload changes, besides protocols' own, [log] level and
# [hub] connections_per_user.
_RELOADED = ("rights", "jwt", "namespaces", "notes")
_NAMESPACE = "namespace:"
# How to change a setting that has its default: the shortest way.
_BY_DEFAULT = {
    "[server] port": "[server] port (--port N)",
    "[server] host": "[server] host (--host)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The complete configuration. A reload creates a new one.

    `namespaces` maps NAME to [namespace:NAME], and '' to [namespace]. `doors` and `producers` map
    full section names. `notes` are warnings: unknown variables, removed settings, and options of
    other servers that have no effect. `origins` maps `[section] key` to the source of each
    configured setting.
    """

    node: NodeSettings
    server: ServerSettings
    log: LogSettings
    journal: JournalSettings
    redis: RedisSettings
    stream: StreamSettings
    hub: HubSettings
    rights: RightsSettings
    jwt: JwtSettings
    metrics: MetricsSettings
    tracing: TracingSettings
    console: ConsoleSettings
    jobs: JobSettings
    publish: PublishSettings
    namespaces: Mapping[str, NamespaceSettings]
    doors: Mapping[str, Section]
    producers: Mapping[str, Section]
    insecure: bool = False
    notes: Sequence[str] = field(default=(), compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def where(self, setting: str) -> str:
        """Return `setting` ([section] key) and the file, variable or option that sets it."""
        origin = self.origins.get(setting, "")
        if not origin:
            return _BY_DEFAULT.get(setting, setting)
        return origin if setting in origin else f"{setting} (set by {origin})"

    def namespace(self, channel: Channel) -> NamespaceSettings:
        """Return the settings of the channel's namespace."""
        return self.namespaces.get(namespace_of(channel)) or self.namespaces[""]


@dataclass(frozen=True, slots=True)
class _ConfiguredValue:
    """One configured value. An error message begins with `where` and `text`."""

    where: str
    text: str

    def line(self, problem: str, *, secret: bool = False) -> str:
        text = "(hidden)" if secret else " ".join(self.text.split())
        return f"{self.where}{text[:57] + '...' if len(text) > 60 else text}: {problem}"


# Section -> key -> value, from one source.
_Source = dict[str, dict[str, _ConfiguredValue]]


def load(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str],
    flags: Mapping[str, str],
    doors: Mapping[str, type[Section]],
    producers: Mapping[str, type[Section]] | None = None,
    imported: Sequence[ImportedConfiguration] = (),
    strict: bool = False,
) -> Config:
    """Load the configuration at a start or reload. Raise ConfigError if it is not valid.

    Args:
        overrides: the values of --set, SECTION.KEY=VALUE.
        flags: values for the names in FLAGS, and `insecure` with any text.
        imported: other servers' configurations; later ones override earlier ones.
        strict: an unknown RELAY_ variable is an error instead of a note.
    """
    classes = {**SECTIONS, **doors, **(producers or {})}
    sources = [_translated(each) for each in imported]
    sources.append(_file(path, classes) if path else {})
    sets = _sets(overrides, classes)
    named = sorted({name for source in (*sources, sets) for name in source} - classes.keys())
    namespaces = [name for name in named if name.startswith(_NAMESPACE)]
    classes |= {name: _class_of(name, classes, "") for name in named}
    unknown: list[str] = []
    sources += [_environment(environ, classes, unknown), sets, _flags(flags)]
    if strict and unknown:
        raise ConfigError(unknown[0])
    configured: _Source = {name: {} for name in classes}
    for source in sources:
        for section, values in source.items():
            _merge(configured[section], values, classes[section])
    removed = [note for name, cls in classes.items() for note in _removed(configured[name], cls)]
    sections = {
        name: _section(
            cls,
            configured["namespace"] | configured[name] if name in namespaces else configured[name],
            name,
        )
        for name, cls in classes.items()
    }
    rules = {"": sections.pop("namespace")}
    rules |= {name.removeprefix(_NAMESPACE): sections.pop(name) for name in namespaces}
    for name, cls in doors.items():
        if cls.sections_by_name:
            sections[name] = _with_own(sections, name, cls.sections_by_name[0])
    return Config(
        **{name: sections.pop(name) for name in SECTIONS if name != "namespace"},  # type: ignore[arg-type]  # each by its own name
        namespaces=rules,  # type: ignore[arg-type]  # _section made them of NamespaceSettings
        producers={name: sections.pop(name) for name in producers or {}},
        doors=sections,
        insecure="insecure" in flags,
        origins={
            f"[{name}] {key}": value.where.rstrip(" =")
            for name, values in configured.items()
            for key, value in values.items()
        },
        notes=[*(note for each in imported for note in _notes(each)), *unknown, *removed],
    )


def after_reload(old: Config, new: Config) -> tuple[Config, list[str]]:
    """Return the current configuration of a running relay after a reload of `new`.

    Also return the changed settings that take effect only after a restart, as `[section] key`.
    """
    kept = {name: getattr(new, name) for name in _RELOADED}
    kept["log"] = old.log.model_copy(update={"level": new.log.level})
    if new.redis.password != old.redis.password:
        kept["redis"] = old.redis.model_copy(update={"password": new.redis.password})
    limit = new.hub.connections_per_user
    kept["hub"] = old.hub.model_copy(update={"connections_per_user": limit})
    kept["doors"] = {
        name: _with_fixed(section, old.doors[name]) for name, section in new.doors.items()
    }
    kept["console"] = _with_fixed(new.console, old.console)
    current = dataclasses.replace(old, **kept)
    used = dict(_sections(current))
    return current, [
        f"[{name}] {key}"
        for name, section in _sections(new)
        for key in type(section).settings()
        if getattr(section, key) != getattr(used[name], key)
    ]


def _with_fixed(section: Section, old: Section) -> Section:
    """Return the section with the `fixed` settings of `old`."""
    return section.model_copy(
        update={
            key: getattr(old, key)
            for key in section.fixed
            # model_copy marks a setting as configured, so copy changed settings only.
            if getattr(section, key, None) != getattr(old, key, None)
        }
    )


def _sections(config: Config) -> Iterator[tuple[str, Section]]:
    """Yield all sections except namespaces, with their names."""
    yield from ((name, getattr(config, name)) for name in SECTIONS if name != "namespace")
    yield from config.doors.items()
    yield from config.producers.items()


def _notes(translation: ImportedConfiguration) -> Iterator[str]:
    if translation.missing:
        yield f"{translation.missing}; using defaults"
    yield from translation.notes


def _translated(translation: ImportedConfiguration) -> _Source:
    source: _Source = {}
    for each in translation.settings:
        source.setdefault(each.section, {})[each.key] = _ConfiguredValue(each.where, each.text)
    return source


def _file(path: Path, classes: Mapping[str, type[Section]]) -> _Source:
    parser = configparser.ConfigParser(
        interpolation=None,
        inline_comment_prefixes=None,
        delimiters=("=",),
        empty_lines_in_values=False,
        # Disable [DEFAULT], which would apply to all sections.
        default_section="\0",
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case
    try:
        # Some editors write a byte order mark.
        parser.read_string(path.read_text(encoding="utf-8-sig"), source=str(path))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {exc.start})") from exc
    except configparser.Error as exc:
        # `from None`: the parser's text quotes the line, which may be a secret.
        raise ConfigError(f"{path}: {_syntax(exc)}") from None
    source: _Source = {}
    for section in parser.sections():
        cls = _class_of(section, classes, f"{path}: [{section}]")
        source[section] = {}
        for key, text in parser.items(section):
            where = f"{path}: [{section}] {key}"
            _check_key(key, cls, where)
            _check_indentation(text, cls, where)
            source[section][key] = _ConfiguredValue(f"{where} = ", text)
    return source


def _syntax(exc: configparser.Error) -> str:
    match exc:
        case configparser.MissingSectionHeaderError():
            return f"line {exc.lineno}: setting before the first [section]"
        case configparser.ParsingError() if exc.errors:
            return f"line {exc.errors[0][0]}: neither a [section] nor KEY = VALUE"
        case configparser.DuplicateSectionError():
            return f"line {exc.lineno}: duplicate section [{exc.section}]"
        case configparser.DuplicateOptionError():
            return f"line {exc.lineno}: duplicate setting [{exc.section}] {exc.option}"
        case _:
            return "is not a valid INI file"


def _environment(
    environ: Mapping[str, str], classes: Mapping[str, type[Section]], unknown: list[str]
) -> _Source:
    """Return the settings in the environment; append a line to `unknown` for each other name."""
    names: dict[str, list[tuple[str, str]]] = {}
    for section, cls in classes.items():
        for key in (*_keys(cls), *cls.removed):
            names.setdefault(env_name(section, key), []).append((section, key))
    source: _Source = {}
    for name, text in sorted(environ.items()):
        if not name.startswith("RELAY_"):
            continue
        if name.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(text):
            continue
        if name not in names:
            if _SERVICE_LINK.fullmatch(name):
                continue
            hint = _near(name, names)
            if name.startswith("RELAY_NAMESPACE_"):
                hint += " (a [namespace:NAME] must be in the file, if only as an empty section)"
            unknown.append(f"environment variable {name}: no setting has this name{hint}")
            continue
        if others := names[name][1:]:
            one, other = (f"[{section}] {key}" for section, key in (names[name][0], others[0]))
            raise ConfigError(
                f"{one} and {other} share the environment variable {name}: rename one of the"
                " sections"
            )
        section, key = names[name][0]
        source.setdefault(section, {})[key] = _ConfiguredValue(
            f"environment variable {name} = ", text
        )
    return source


def _sets(overrides: Iterable[str], classes: Mapping[str, type[Section]]) -> _Source:
    source: _Source = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        # Split at the last dot: the name of a namespace may contain dots.
        section, _, key = (part.strip() for part in name.rpartition("."))
        if not equals or not section or not key:
            # Don't show the text: it may be a secret without its name.
            raise ConfigError(f"--set {name if equals else '...'}: must be SECTION.KEY=VALUE")
        where = f"--set {section}.{key}"
        _check_key(key, _class_of(section, classes, where), where)
        source.setdefault(section, {})[key] = _ConfiguredValue(f"{where}=", text.strip())
    return source


def _flags(flags: Mapping[str, str]) -> _Source:
    source: _Source = {}
    for flag, (section, key) in FLAGS.items():
        if flag in flags:
            source.setdefault(section, {})[key] = _ConfiguredValue(f"--{flag} ", flags[flag])
    return source


def _class_of(section: str, classes: Mapping[str, type[Section]], where: str) -> type[Section]:
    if cls := classes.get(section):
        return cls
    if section.startswith(_NAMESPACE):
        name = section.removeprefix(_NAMESPACE)
        try:
            parse_channel(name)
        except ValueError:
            name = ":"
        if ":" in name:
            raise ConfigError(
                f"{where}: namespace name must not contain ':'; it is the text before the first"
                " ':' of a channel, 1 to 255 characters"
            )
        return NamespaceSettings
    for name, cls in classes.items():
        if cls.sections_by_name and section.startswith(f"{name}:"):
            return cls.sections_by_name[1]
    by_name = [f"{name}:NAME" for name, cls in classes.items() if cls.sections_by_name]
    known = ", ".join([*classes, *by_name, "namespace:NAME"])
    raise ConfigError(f"{where}: no such section{_near(section, classes)}; there are {known}")


def _check_indentation(text: str, cls: type[Section], where: str) -> None:
    """Raise ConfigError if an indented line, which continues a value, looks like a setting."""
    keys = {*_keys(cls), *cls.removed}
    for line in text.splitlines()[1:]:
        name, equals, _ = line.partition("=")
        name = name.strip()
        if equals and name in keys:
            raise ConfigError(
                f"{where}: the indented line with {name} = belongs to this value; begin that line"
                " in the first column"
            )


def _check_key(key: str, cls: type[Section], where: str) -> None:
    keys = list(_keys(cls))
    if key not in keys and key not in cls.removed:
        raise ConfigError(
            f"{where} is not a setting{_near(key, keys)}; there are {', '.join(keys)}"
        )


def _keys(cls: type[Section]) -> Iterator[str]:
    for key in cls.settings():
        yield key
        if _is_secret(cls, key):
            yield f"{key}_file"


def _removed(configured: dict[str, _ConfiguredValue], cls: type[Section]) -> Iterator[str]:
    """Replace removed settings as `cls.from_removed` returns. Yield a note for each."""
    values = {key: configured.pop(key) for key in cls.removed if key in configured}
    for key, text in cls.from_removed({key: each.text for key, each in values.items()}).items():
        configured.setdefault(key, _ConfiguredValue(next(iter(values.values())).where, text))
    for key, each in values.items():
        yield f"{each.where.rstrip(' =')} {cls.removed[key]}"


def _is_secret(cls: type[Section], key: str) -> bool:
    field = cls.settings().get(key)
    return field is not None and field.annotation is SecretStr


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def _merge(
    into: dict[str, _ConfiguredValue], values: Mapping[str, _ConfiguredValue], cls: type[Section]
) -> None:
    """Override the values of earlier sources."""
    for key in values:
        for other in cls.instead_of.get(key, ()):
            into.pop(other, None)
    for key, value in values.items():
        file_key = f"{key}_file"
        if _is_secret(cls, key) and file_key in values:
            raise ConfigError(
                values[file_key].line(f"{key} is set in the same source; set only one of the two")
            )
        # A secret and its file are one setting. Either form in a later source replaces the other.
        if _is_secret(cls, key):
            into.pop(file_key, None)
        elif _is_secret(cls, key.removesuffix("_file")):
            into.pop(key.removesuffix("_file"), None)
        into[key] = value


def _section(cls: type[Section], configured: Mapping[str, _ConfiguredValue], name: str) -> Section:
    texts: dict[str, str] = {}
    for key, value in configured.items():
        secret_key = key.removesuffix("_file")
        if key not in cls.model_fields:
            texts[secret_key] = _read_secret(value)
        else:
            texts[key] = value.text
    for key, text in texts.items():
        if _is_secret(cls, key) and _PLACEHOLDER.fullmatch(text):
            secret = configured.get(key) or configured[f"{key}_file"]
            raise ConfigError(
                secret.line(
                    "is a placeholder from an example; set your own secret",
                    secret=key in configured,
                )
            )
    try:
        return cls.model_validate(texts)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
    # Raise outside of the except block, without a cause: pydantic's text quotes the values.
    own = error.get("ctx", {}).get("error")
    key = str(error["loc"][0]) if error["loc"] else ""
    if key not in cls.model_fields:
        raise ConfigError(f"[{name}]: {own or error['msg']}")
    problem = str(own) if own else allowed(cls.model_fields[key])
    culprit = (
        configured.get(key)
        or configured.get(f"{key}_file")
        or _ConfiguredValue(f"[{name}] {key} = ", "")
    )
    raise ConfigError(culprit.line(problem, secret=_is_secret(cls, key) and key in configured))


def _with_own(sections: dict[str, Section], name: str, field: str) -> Section:
    """Return the section with its subsections, and remove these from `sections`."""
    section = sections[name]
    start = f"{name}:"
    own = {
        each.removeprefix(start): sections.pop(each)
        for each in list(sections)
        if each.startswith(start)
    }
    if not own:
        return section
    # Pass only configured fields, which `Section.unservable` depends on.
    configured = {key: getattr(section, key) for key in section.model_fields_set}
    try:
        return type(section).model_validate({**configured, field: own})
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
    raise ConfigError(f"[{name}:...]: {error.get('ctx', {}).get('error') or error['msg']}")


def _read_secret(value: _ConfiguredValue) -> str:
    try:
        # Some editors begin a file with a byte order mark.
        text = Path(value.text).read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(value.line(f"cannot be read: {exc.strerror}")) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(value.line("is not UTF-8 text")) from exc
    # Remove the newline that editors and `echo` add. Other white space may be intended.
    return text.removesuffix("\n")
