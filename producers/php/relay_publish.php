<?php

/**
 * Publish one event to relay's Redis. One file for PHP 7.4 or newer, without extensions.
 *
 *     require 'relay_publish.php';
 *     $id = relay_publish('news', ['hello' => 1], ['type' => 'note', 'uid' => 'order-7']);
 *
 *     php relay_publish.php CHANNEL DATA [--type T] [--uid U] [--to NAMES] [--client C]
 *         [--spool FILE]
 *
 * relay_publish() returns the entry's ID or throws RelayPublishError within `limit_ms`. PHP's DNS
 * lookup has its own time limit, so use an address or a name from /etc/hosts.
 *
 * With `spool`, a local file, an event that cannot be sent now is appended to that file, and null is
 * returned. Later events are appended as well, until `python -m producers spool FILE` has delivered
 * the earlier ones.
 */

declare(strict_types=1);

final class RelayPublishError extends RuntimeException
{
    /** Sent without a reply, so the event may have been appended. Retry it with a uid. */
    public bool $unknown = false;
    /** Redis is unreachable at the moment. The event can be sent later. */
    public bool $away = false;
}

const RELAY_SPOOL_BYTES = 67108864;
const RELAY_BEHIND = 'the spool contains earlier events';
/** First words of temporary errors, as in relay/stream. */
const RELAY_TEMPORARY = '/^-(BUSY|MISCONF|OOM|TRYAGAIN|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|UNBLOCKED|NOREPLICAS) /';

/** Appends once per uid, and returns the ID of the first entry. */
const RELAY_APPEND_ONCE = <<<'LUA'
local known = redis.call('GET', KEYS[2])
if known then
  if KEYS[3] then redis.call('SET', KEYS[3], '', 'PX', 1000) end
  return known
end
local id = redis.call('XADD', KEYS[1], unpack(ARGV, 2))
redis.call('SET', KEYS[2], id, 'PX', ARGV[1])
return id

LUA;

/**
 * @param mixed $data a string is sent unchanged, other values as JSON
 * @param array $options type, uid, to (a string, or an array of names), client; redis (URL),
 *   password, prefix, limit_ms, window_s (how long a uid is remembered), maxlen; spool (a file)
 * @return ?string the entry's ID; null if the event was spooled
 */
function relay_publish(string $channel, $data, array $options = []): ?string
{
    [$id, $reason] = relay_publish_or_spool($channel, $data, $options);
    if ($id === null && $reason !== RELAY_BEHIND) {
        error_log("relay_publish: writing events to the spool {$options['spool']}: $reason");
    }
    return $id;
}

/** The entry's ID and '', or null and the reason why the event was spooled. */
function relay_publish_or_spool(string $channel, $data, array $options): array
{
    // The program's own error handler must not see the warnings that are suppressed with "@".
    set_error_handler(static fn (): bool => false);
    try {
        return relay_checked_publish($channel, $data, $options);
    } catch (RelayPublishError $error) {
        throw $error;
    } catch (Throwable $error) { // of an option or of data that is an object
        throw new RelayPublishError($error->getMessage(), 0, $error);
    } finally {
        restore_error_handler();
    }
}

function relay_checked_publish(string $channel, $data, array $options): array
{
    $options += [
        'redis' => relay_environment('RELAY_REDIS_URL', 'redis://127.0.0.1:6379/0'),
        'password' => relay_environment('RELAY_REDIS_PASSWORD', ''),
        'prefix' => relay_environment('RELAY_REDIS_PREFIX', 'relay:'),
        'limit_ms' => 200,
        'window_s' => 86400,
        'maxlen' => 0,
        'spool' => null,
    ];
    $spool = $options['spool'];
    if ($spool !== null) {
        // Set a uid before the first attempt: a spooled event must arrive once even if the attempt
        // succeeded and only its reply was lost.
        $options['uid'] = $options['uid'] ?? bin2hex(random_bytes(16));
    }
    if (!is_numeric($options['limit_ms']) || !($options['limit_ms'] > 0)) {
        throw new RelayPublishError('limit_ms must be a positive number');
    }
    $address = relay_parse((string) $options['redis'], (string) $options['password']);
    $deadline = microtime(true) + $options['limit_ms'] / 1000;
    $fields = ['data', is_string($data) ? $data : relay_json($data)];
    foreach (['type', 'uid', 'to', 'client'] as $name) {
        if (isset($options[$name])) {
            $value = $options[$name];
            $list = $name === 'to' && is_array($value);
            array_push($fields, $name, $list ? relay_json(array_values($value)) : (string) $value);
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
        return [relay_send($address, array_merge($command, $words), $deadline), ''];
    }
    clearstatcache(true, $spool);
    $reason = RELAY_BEHIND;
    $unknown = false;
    if (!@filesize($spool)) {
        try {
            return [relay_send($address, array_merge($command, $words), $deadline), ''];
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
 * Append a line to the spool as producers/spool.py does, under the lock of $path.state. Its two
 * numbers: how often the spool was emptied, and how many bytes at its start were delivered.
 */
function relay_spool(string $path, string $line, float $limit_s): void
{
    $lock = relay_open("$path.state", 'c+');
    $deadline = microtime(true) + $limit_s;
    while (!flock($lock, LOCK_EX | LOCK_NB)) {
        if (microtime(true) > $deadline) {
            throw new RelayPublishError('locked by another process');
        }
        usleep(2000);
    }
    $file = relay_open($path, 'a+');
    $size = fstat($file)['size'];
    if ($size + strlen($line) > RELAY_SPOOL_BYTES) {
        throw new RelayPublishError("full, $size bytes");
    }
    if ($size) {
        // End an incomplete line whose writer died. It is rejected when the spool is delivered.
        fseek($file, -1, SEEK_END);
        $line = fread($file, 1) === "\n" ? $line : "\n$line";
    } elseif (preg_match('/^(\d+) 0*[1-9]/', (string) stream_get_contents($lock), $found)) {
        // After `rm` the number of delivered bytes refers to the deleted file.
        rewind($lock);
        fwrite($lock, sprintf("%020d %020d\n", (int) $found[1] + 1, 0));
    }
    if (@fwrite($file, $line) !== strlen($line)) {
        $reason = error_get_last()['message'] ?? 'no space left on the disk';
        @ftruncate($file, $size);
        throw new RelayPublishError($reason);
    }
    flock($lock, LOCK_UN); // sync without the lock, so that several processes can wait for the disk
    if (function_exists('fsync') && !@fsync($file)) { // PHP 8.1
        throw relay_unknown('could not be synced to the disk');
    }
}

function relay_open(string $path, string $mode)
{
    $mask = umask(0077); // readable by the owner only, since events may contain private data
    $file = @fopen($path, $mode);
    umask($mask);
    if (!$file) {
        throw new RelayPublishError(error_get_last()['message'] ?? "$path cannot be opened");
    }
    return $file;
}

/** Escape a channel's name for keys; see `escape` in relay/stream/format/keys.py. */
function relay_escape(string $channel): string
{
    return preg_replace_callback(
        '/[\x00-\x20{}\x7f]|%(?=[01][0-9A-F]|2[05]|7[BDF])/',
        fn (array $found): string => sprintf('%%%02X', ord($found[0])),
        $channel
    );
}

/** Reject events that relay could only move to the dead letters. */
function relay_check(string $channel, array $fields): void
{
    $wrong = null;
    if (!preg_match('/^.{1,255}$/Dsu', $channel)) {
        $wrong = 'channel must have 1 to 255 characters of valid UTF-8';
    }
    foreach (array_chunk($fields, 2) as [$name, $value]) {
        if (!preg_match('//u', $value)) {
            $wrong = "$name is not UTF-8";
        } elseif ($name === 'type' && preg_match('/^relay:|[\x00-\x1f\x7f]/', $value)) {
            $wrong = 'type is reserved or contains a control character';
        } elseif ($name === 'to') {
            $wrong = relay_wrong_recipients($value) ?? $wrong;
        } elseif ($name === 'uid' && ($value === '' || strlen($value) > 255)) {
            $wrong = 'uid must have 1 to 255 bytes';
        }
    }
    if ($wrong !== null) {
        throw new RelayPublishError($wrong);
    }
}

function relay_wrong_recipients(string $to): ?string
{
    $names = preg_split('/[,\s]+/', $to, -1, PREG_SPLIT_NO_EMPTY);
    if (strpos(ltrim($to), '[') === 0) {
        $names = json_decode($to);
        if (!is_array($names) || $names !== array_filter($names, 'is_string')) {
            return 'to is not a list of names';
        }
    }
    return !$names || preg_grep('/^((user|group|client):)?$/D', $names) ? 'to has no recipients' : null;
}

function relay_environment(string $name, string $default): string
{
    $value = getenv($name);
    return $value === false || $value === '' ? $default : $value;
}

function relay_json($value): string
{
    $flags = JSON_THROW_ON_ERROR | JSON_UNESCAPED_UNICODE | JSON_UNESCAPED_SLASHES | JSON_PRESERVE_ZERO_FRACTION;
    try {
        return json_encode($value, $flags);
    } catch (JsonException $exception) {
        throw new RelayPublishError("data cannot be encoded as JSON: {$exception->getMessage()}");
    }
}

/**
 * The address of Redis in the form that docs/producers.md describes, the same for all producers.
 *
 * @return array where, user, password, db
 */
function relay_parse(string $url, string $password): array
{
    $form = '~^redis://(?:([^/?#[\]]*)@)?(\[[0-9a-f:.]+\]|[^:/?#@[\]\s]+)(?::(\d{0,5}))?(?:/(\d{0,9}))?$~Di';
    $found = [];
    $port = preg_match($form, $url, $found) ? (int) (($found[3] ?? '') === '' ? 6379 : $found[3]) : 0;
    if ($port < 1 || $port > 65535 || preg_match('/[\x00-\x1f\x7f]/', $url)) {
        throw new RelayPublishError('address of Redis must be redis://[user:password@]host:port/db');
    }
    // A "%" without two hexadecimal digits stands for itself.
    [$user, $secret] = array_map('rawurldecode', explode(':', "$found[1]:", 2));
    $secret = substr($secret, 0, -1);
    if (!preg_match('//u', "$user$secret")) {
        throw new RelayPublishError('user or password of the address of Redis is not UTF-8');
    }
    return [
        'where' => "tcp://$found[2]:$port",
        'user' => $user,
        'password' => $secret === '' ? $password : $secret,
        'db' => (int) ($found[4] ?? 0),
    ];
}

/** Connect, authenticate and send $command. Returns the reply. */
function relay_send(array $address, array $command, float $deadline): string
{
    ['where' => $where, 'user' => $user, 'password' => $password, 'db' => $db] = $address;
    $login = [];
    if ($user !== '' || $password !== '') {
        $login[] = ['AUTH', $user === '' ? 'default' : $user, $password];
    }
    if ($db) {
        $login[] = ['SELECT', $db];
    }

    $left = max($deadline - microtime(true), 0.001);
    $socket = @stream_socket_client($where, $number, $reason, $left);
    if (!$socket) {
        throw relay_away("Redis at $where cannot be reached: $reason");
    }
    stream_set_blocking($socket, false);
    try {
        // If the login or the database is rejected, the command must not be sent as another user or
        // to database 0, so it waits for the replies.
        try {
            relay_call($socket, $login, $where, $deadline);
        } catch (RelayPublishError $error) {
            $error->unknown = false;
            $error->away = true;
            throw $error;
        }
        return relay_call($socket, [$command], $where, $deadline);
    } finally {
        fclose($socket);
    }
}

/** Send commands in one write. Returns the last reply. */
function relay_call($socket, array $commands, string $where, float $deadline): string
{
    $reply = $buffer = '';
    relay_write($socket, $commands, $where, $deadline);
    foreach ($commands as [$word]) {
        $reply = relay_reply($socket, $buffer, $where, $deadline);
        if ($reply[0] === '-') {
            $error = new RelayPublishError("$word: " . substr($reply, 1));
            $error->away = (bool) preg_match(RELAY_TEMPORARY, "$reply ");
            throw $error;
        }
    }
    return $reply;
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

/** Read one reply: the text of a string, or an error with its '-'. */
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
            throw relay_unknown("$where sent an invalid reply; it is not a Redis server");
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
        . "Prints the entry's ID. Exit codes: 0 published, 1 failed, 2 usage, 3 written to the spool FILE,\n"
        . "which `python -m producers spool FILE` delivers. For 1 and 3, one line on stderr has the reason.\n";
    $plain = [];
    $options = [];
    while ($arguments) {
        $word = array_shift($arguments);
        if (preg_match('/^--(type|uid|to|client|limit-ms|maxlen|spool)$/D', $word, $found) && $arguments) {
            $value = array_shift($arguments);
            $name = str_replace('-', '_', $found[1]);
            $number = $name === 'limit_ms' || $name === 'maxlen';
            if ($number && !preg_match($name === 'maxlen' ? '/^\d{1,9}$/D' : '/^0*[1-9]\d{0,8}$/D', $value)) {
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
