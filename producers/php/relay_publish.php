<?php

/**
 * Publishes one event to a relay's Redis. One file, PHP 7.4 or newer, no extension.
 *
 *     require 'relay_publish.php';
 *     $id = relay_publish('news', ['hello' => 1], ['type' => 'note', 'uid' => 'order-7']);
 *
 *     php relay_publish.php CHANNEL DATA [--type T] [--uid U] [--to NAMES] [--client C]
 *         [--spool FILE]
 *
 * relay_publish() returns the entry's ID or throws RelayPublishError, within `limit_ms`; only the
 * look-up of a host name has PHP's own limit, so give an address, or a name from /etc/hosts.
 *
 * With `spool`, a local file, an event that cannot be sent now is appended there and null returned,
 * and so is every later one until `python -m producers spool FILE` has delivered what waits.
 */

declare(strict_types=1);

final class RelayPublishError extends RuntimeException
{
    /** Sent, but not answered: the event may have been appended. With a uid, publish it again. */
    public bool $unknown = false;
    /** The relay's Redis cannot be asked now; the same event may be taken later. */
    public bool $away = false;
}

const RELAY_SPOOL_BYTES = 67108864;
const RELAY_BEHIND = 'earlier events wait there';
/** First words of replies that say "not now", as in relay/stream. */
const RELAY_NOT_NOW = '/^-(BUSY|MISCONF|OOM|TRYAGAIN|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|UNBLOCKED|NOREPLICAS) /';

/** Appends once for a uid, and tells the first entry's ID. */
const RELAY_APPEND_ONCE = <<<'LUA'
local known = redis.call('GET', KEYS[2])
if known then return known end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('SET', KEYS[2], id, 'PX', ARGV[1])
return id

LUA;

/**
 * @param mixed $data a string as it is, anything else as JSON
 * @param array $options type, uid, to (a string, or an array of names), client; redis (URL),
 *   password, prefix, limit_ms, window_s (how long a uid is remembered), maxlen; spool (a file)
 * @return ?string the entry's ID; null where the event is in the spool
 */
function relay_publish(string $channel, $data, array $options = []): ?string
{
    [$id, $reason] = relay_publish_or_spool($channel, $data, $options);
    if ($id === null && $reason !== RELAY_BEHIND) {
        error_log("relay_publish: events go to the spool {$options['spool']}: $reason");
    }
    return $id;
}

/** The entry's ID and '', or null and why the event is in the spool. */
function relay_publish_or_spool(string $channel, $data, array $options): array
{
    $options += [
        'redis' => getenv('RELAY_REDIS_URL') ?: 'redis://127.0.0.1:6379/0',
        'password' => getenv('RELAY_REDIS_PASSWORD') ?: '',
        'prefix' => getenv('RELAY_REDIS_PREFIX') ?: 'relay:',
        'limit_ms' => 200,
        'window_s' => 86400,
        'maxlen' => 0,
        'spool' => null,
    ];
    $spool = $options['spool'];
    if ($spool !== null) {
        // From the start, so that the event arrives once even where its answer is lost.
        $options['uid'] = $options['uid'] ?? bin2hex(random_bytes(16));
    }
    $deadline = microtime(true) + $options['limit_ms'] / 1000;
    $fields = ['data', is_string($data) ? $data : relay_json($data)];
    foreach (['type', 'uid', 'to', 'client'] as $name) {
        if (isset($options[$name])) {
            $value = $options[$name];
            array_push($fields, $name, is_array($value) ? relay_json(array_values($value)) : (string) $value);
        }
    }
    relay_check($channel, $fields);
    $words = $options['maxlen'] ? ['MAXLEN', '~', $options['maxlen'], '*'] : ['*'];
    $words = array_merge($words, $fields);
    $tag = relay_escape($channel);
    $stream = "{$options['prefix']}stream:{{$tag}}";
    if (isset($options['uid'])) {
        $mark = "{$options['prefix']}uid:{{$tag}}:{$options['uid']}";
        $command = ['EVAL', RELAY_APPEND_ONCE, 2, $stream, $mark, $options['window_s'] * 1000];
    } else {
        $command = ['XADD', $stream];
    }
    if ($spool === null) {
        return [relay_ask($options, array_merge($command, $words), $deadline), ''];
    }
    clearstatcache(true, $spool);
    $reason = RELAY_BEHIND;
    $unknown = false;
    if (!@filesize($spool)) {
        try {
            return [relay_ask($options, array_merge($command, $words), $deadline), ''];
        } catch (RelayPublishError $error) {
            if (!$error->away) {
                throw $error;
            }
            $reason = $error->getMessage();
            $unknown = $error->unknown;
        }
    }
    $event = ['channel' => $channel];
    foreach (array_chunk($fields, 2) as [$name, $value]) {
        $event[$name] = $value;
    }
    try {
        relay_spool($spool, relay_json($event) . "\n", $options['limit_ms'] / 1000);
    } catch (RelayPublishError $error) {
        $failed = new RelayPublishError("$reason; spool $spool: {$error->getMessage()}");
        $failed->unknown = $unknown || $error->unknown;
        throw $failed;
    }
    return [null, $reason];
}

/**
 * Append a line to the spool as producers/spool.py does: under the lock of $path.state, whose two
 * numbers say how often the spool was emptied and how many bytes at its start are delivered.
 */
function relay_spool(string $path, string $line, float $limit_s): void
{
    $lock = relay_open("$path.state", 'c+');
    $deadline = microtime(true) + $limit_s;
    while (!flock($lock, LOCK_EX | LOCK_NB)) {
        if (microtime(true) > $deadline) {
            throw new RelayPublishError('locked by others');
        }
        usleep(2000);
    }
    $file = relay_open($path, 'a+');
    $size = fstat($file)['size'];
    if ($size + strlen($line) > RELAY_SPOOL_BYTES) {
        throw new RelayPublishError("full, $size bytes");
    }
    if ($size) {
        // A writer that died has left a part of its line: that part is kept with the refused.
        fseek($file, -1, SEEK_END);
        $line = fread($file, 1) === "\n" ? $line : "\n$line";
    } elseif (preg_match('/^(\d+) 0*[1-9]/', (string) stream_get_contents($lock), $found)) {
        // After `rm` the number of delivered bytes would be one of another file.
        rewind($lock);
        fwrite($lock, sprintf("%020d %020d\n", (int) $found[1] + 1, 0));
    }
    if (@fwrite($file, $line) !== strlen($line)) {
        $reason = error_get_last()['message'] ?? 'written in part';
        @ftruncate($file, $size);
        throw new RelayPublishError($reason);
    }
    flock($lock, LOCK_UN); // many may wait for the disk at once
    if (function_exists('fsync') && !@fsync($file)) { // PHP 8.1
        throw relay_unknown('not known to be on the disk');
    }
}

function relay_open(string $path, string $mode)
{
    $mask = umask(0077); // for its owner alone: events may hold anything
    $file = @fopen($path, $mode);
    umask($mask);
    if (!$file) {
        throw new RelayPublishError(error_get_last()['message'] ?? "$path cannot be opened");
    }
    return $file;
}

/** A channel's name as it stands in keys; see `escape` in relay/stream/format/keys.py. */
function relay_escape(string $channel): string
{
    return preg_replace_callback(
        '/[\x00-\x20{}\x7f]|%(?=[01][0-9A-F]|2[05]|7[BDF])/',
        fn (array $found): string => sprintf('%%%02X', ord($found[0])),
        $channel
    );
}

/** Refuse what the relay would have to put to the dead letters. */
function relay_check(string $channel, array $fields): void
{
    $wrong = null;
    if (!preg_match('/^.{1,255}$/Dsu', $channel)) {
        $wrong = 'a channel is 1 to 255 characters of valid UTF-8';
    }
    foreach (array_chunk($fields, 2) as [$name, $value]) {
        if (!preg_match('//u', $value)) {
            $wrong = "$name is not UTF-8";
        } elseif ($name === 'type' && preg_match('/^relay:|[\x00-\x1f\x7f]/', $value)) {
            $wrong = 'type is reserved or has a control character';
        } elseif ($name === 'to' && (trim($value, ", \t\r\n") === '' || $value === '[]')) {
            $wrong = 'to names nobody';
        } elseif ($name === 'uid' && ($value === '' || strlen($value) > 255)) {
            $wrong = 'a uid is 1 to 255 bytes long';
        }
    }
    if ($wrong !== null) {
        throw new RelayPublishError($wrong);
    }
}

function relay_json($value): string
{
    $flags = JSON_THROW_ON_ERROR | JSON_UNESCAPED_UNICODE | JSON_UNESCAPED_SLASHES | JSON_PRESERVE_ZERO_FRACTION;
    try {
        return json_encode($value, $flags);
    } catch (JsonException $exception) {
        throw new RelayPublishError("data cannot be JSON: {$exception->getMessage()}");
    }
}

/** Connect, log in and send $command, all in one write; its reply. */
function relay_ask(array $options, array $command, float $deadline): string
{
    $url = parse_url($options['redis']);
    if (!$url || ($url['scheme'] ?? '') !== 'redis' || !isset($url['host'])) {
        throw new RelayPublishError('the address of Redis is redis://[user:password@]host:port/db');
    }
    $where = "tcp://{$url['host']}:" . ($url['port'] ?? 6379);
    $password = rawurldecode($url['pass'] ?? '') ?: $options['password'];
    $commands = [];
    if ($password !== '') {
        $commands[] = ['AUTH', rawurldecode($url['user'] ?? '') ?: 'default', $password];
    }
    if ((int) trim($url['path'] ?? '', '/')) {
        $commands[] = ['SELECT', (int) trim($url['path'], '/')];
    }
    $commands[] = $command;

    $left = max($deadline - microtime(true), 0.001);
    $socket = @stream_socket_client($where, $number, $reason, $left);
    if (!$socket) {
        throw relay_away("Redis at $where cannot be reached: $reason");
    }
    stream_set_blocking($socket, false);
    try {
        relay_write($socket, $commands, $where, $deadline);
        $buffer = '';
        foreach ($commands as [$word]) {
            $reply = relay_reply($socket, $buffer, $where, $deadline);
            if ($reply[0] === '-') {
                $error = new RelayPublishError("$word: " . substr($reply, 1));
                $error->away = $word === 'AUTH' || $word === 'SELECT' || preg_match(RELAY_NOT_NOW, "$reply ");
                throw $error;
            }
        }
        return $reply;
    } finally {
        fclose($socket);
    }
}

function relay_write($socket, array $commands, string $where, float $deadline): void
{
    $out = '';
    foreach ($commands as $words) {
        $out .= '*' . count($words) . "\r\n";
        foreach ($words as $word) {
            $out .= '$' . strlen((string) $word) . "\r\n$word\r\n";
        }
    }
    while ($out !== '') {
        relay_wait($socket, true, $where, $deadline);
        $count = @fwrite($socket, $out);
        if ($count === false) {
            throw relay_unknown("Redis at $where closed the connection");
        }
        $out = (string) substr($out, $count);
    }
}

/** One reply: the text of a string; with its '-' where it is an error. */
function relay_reply($socket, string &$buffer, string $where, float $deadline): string
{
    while (!preg_match('/^(?:([+-][^\r\n]*)\r\n|\$(\d+)\r\n)/', $buffer, $found)
        || (isset($found[2]) && strlen($buffer) < strlen($found[0]) + $found[2] + 2)) {
        relay_wait($socket, false, $where, $deadline);
        $more = fread($socket, 65536);
        if ($more === false || ($more === '' && feof($socket))) {
            throw relay_unknown("Redis at $where closed the connection");
        }
        $buffer .= $more;
        if ($buffer !== '' && strpos('+-$', $buffer[0]) === false) {
            throw relay_unknown("$where does not speak as Redis does");
        }
    }
    $length = isset($found[2]) ? (int) $found[2] + 2 : 0;
    $reply = isset($found[2]) ? substr($buffer, strlen($found[0]), $length - 2) : $found[1];
    $buffer = (string) substr($buffer, strlen($found[0]) + $length);
    return $reply;
}

function relay_wait($socket, bool $to_write, string $where, float $deadline): void
{
    $left = (int) (($deadline - microtime(true)) * 1000000);
    $read = $to_write ? [] : [$socket];
    $write = $to_write ? [$socket] : [];
    $except = [];
    if ($left <= 0 || !@stream_select($read, $write, $except, 0, $left)) {
        throw relay_unknown("Redis at $where did not answer within the time limit");
    }
}

function relay_away(string $text): RelayPublishError
{
    $error = new RelayPublishError($text);
    $error->away = true;
    return $error;
}

function relay_unknown(string $text): RelayPublishError
{
    $error = relay_away($text);
    $error->unknown = true;
    return $error;
}

/** @param string[] $arguments */
function relay_publish_main(array $arguments): int
{
    $usage = "usage: relay_publish.php CHANNEL DATA [--type T] [--uid U] [--to NAMES] [--client C]\n"
        . "         [--limit-ms 200] [--maxlen N] [--spool FILE]\n"
        . "DATA - is standard input. Redis: RELAY_REDIS_URL, RELAY_REDIS_PASSWORD, RELAY_REDIS_PREFIX.\n"
        . "Prints the entry's ID. Exit codes: 0 published, 1 failed (one line says why), 2 usage,\n"
        . "3 kept in the spool FILE (one line says why), which `python -m producers spool FILE` delivers.\n";
    $plain = [];
    $options = [];
    while ($arguments) {
        $word = array_shift($arguments);
        if (preg_match('/^--(type|uid|to|client|limit-ms|maxlen|spool)$/D', $word, $found) && $arguments) {
            $value = array_shift($arguments);
            $name = str_replace('-', '_', $found[1]);
            $number = $name === 'limit_ms' || $name === 'maxlen';
            if ($number && !preg_match('/^\d{1,9}$/D', $value)) {
                fwrite(STDERR, $usage);
                return 2;
            }
            $options[$name] = $number ? (int) $value : $value;
        } else {
            $plain[] = $word;
        }
    }
    if (count($plain) !== 2) {
        fwrite(STDERR, $usage);
        return 2;
    }
    [$channel, $data] = $plain;
    try {
        $data = $data === '-' ? stream_get_contents(STDIN) : $data;
        [$id, $reason] = relay_publish_or_spool($channel, $data, $options);
        if ($id === null) {
            fwrite(STDERR, "relay_publish: spooled: $reason\n");
            return 3;
        }
        echo "$id\n";
        return 0;
    } catch (RelayPublishError $error) {
        fwrite(STDERR, "relay_publish: {$error->getMessage()}" . ($error->unknown ? '; the event may have been appended' : '') . "\n");
        return 1;
    }
}

if (PHP_SAPI === 'cli' && realpath($_SERVER['argv'][0] ?? '') === __FILE__) {
    exit(relay_publish_main(array_slice($_SERVER['argv'], 1)));
}
