<?php
/* What Pydio 6.4.2's PHP puts on the wire, byte by byte in shape, in our own words:

     php pydio_publisher.php ws://HOST:PORT/PATH KEY      < lines
     php pydio_publisher.php ws://HOST:PORT/PATH KEY json < lines
     php pydio_publisher.php ws://HOST:PORT/PATH KEY latin1 < lines

   Each line of the input is a JSON array of messages, and each line is one PHP request: one
   connection, made with the first message and dropped without a close frame at its end. The bodies
   are serialized by PHP, or with "json" in JSON as 6.5 sends them, or with "latin1" as by a server
   whose AJXP_LOCALE is ISO-8859-1. Prints the status line of each handshake. */

[, $url, $key] = $argv;
$form = $argv[3] ?? 'serialize';
$parts = parse_url($url);

function frame(string $payload): string
{
    $size = strlen($payload);
    if ($size <= 125) {
        $length = chr(128 | $size);
    } elseif ($size <= 255 * 255 - 1) {
        $length = chr(128 | 126) . pack('n', $size);
    } else {
        $length = chr(128 | 127) . pack('N', 0) . pack('N', $size);
    }
    $mask = random_bytes(4);
    $masked = $payload ^ substr(str_repeat($mask, intdiv($size, 4) + 1), 0, $size);
    return chr(128 | 1) . $length . $mask . $masked;
}

while (($line = fgets(STDIN)) !== false) {
    $socket = stream_socket_client("tcp://{$parts['host']}:{$parts['port']}", $number, $text, 1);
    if (!$socket) {
        echo "$text\n";
        continue;
    }
    // The head and the eight bytes of an older draft leave in one write.
    fwrite($socket, "GET $url HTTP/1.1\r\n"
        . "Connection: Upgrade\r\n"
        . "Host: {$parts['host']}:{$parts['port']}\r\n"
        . 'Sec-WebSocket-Key: ' . base64_encode(random_bytes(16)) . "\r\n"
        . "Sec-WebSocket-Origin: http://{$parts['host']}\r\n"
        . "Sec-WebSocket-Version: 8\r\n"
        . "Upgrade: websocket\r\n"
        . "Admin-Key: $key\r\n"
        . "\r\n" . random_bytes(8));
    echo strtok((string) fread($socket, 8192), "\r"), "\n";
    foreach (json_decode($line, true, 512, JSON_THROW_ON_ERROR) as $message) {
        if ($form === 'latin1') {
            foreach ($message['NODE_PATHES'] as &$path) {
                $path = iconv('UTF-8', 'ISO-8859-1', $path);
            }
        }
        $rest = frame($form === 'json' ? json_encode($message) : serialize($message));
        while ($rest !== '') {
            $sent = fwrite($socket, $rest);
            if (!$sent) {
                break;
            }
            $rest = substr($rest, $sent);
        }
    }
    fclose($socket);
}
