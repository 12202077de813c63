/*
 * Messages over TLS-PSK: a fleet that sends as devices do, pipelined, and counts what is acknowledged.
 *
 * One process, one epoll, `--clients` connections that stay open, each another device of the fleet. Every connection keeps
 * up to `--window` messages unanswered; with `--rate` messages are due at fixed times instead, spread over the
 * connections, and their latency counts from when they were due. Protocols:
 *
 *     lines  a payload and a line break; the answers are `ok N`, in order
 *     mqtt   MQTT 3.1.1, PUBLISH with QoS 1 to bench/IDENTITY; PUBACKs, in order; with --subscribe one more connection
 *            (device --clients) has subscribed to bench/# with QoS 1, and answers each message with a PUBACK
 *
 * It opens everything, prints {"ready": N}, waits for a line on stdin, runs, and prints one line of JSON once all is
 * acknowledged and the subscriber has all. It never sleeps meanwhile: servers need not wake it, see load.c; `idle_s` says
 * how long it had nothing to do. With --hold it then keeps the connections open until stdin ends.
 * Exit status: 0 all went well, 1 something failed (the reason is on stderr), 2 wrong usage.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client.h"

enum {
    CLIENTS_MAX = 1024,
    COUNT_MAX = 20000000,
    WINDOW_MAX = 4096,
    PAYLOAD_BYTES_MAX = 8192,
    OUT_BYTES = 64 * 1024,
    IN_BYTES = 64 * 1024,
    RECORD_BYTES = 16 * 1024,
    TIMEOUT_S = 600,
};

struct connection {
    SSL *ssl;
    int fd;
    uint32_t quota, sent, answered;
    uint64_t due_ns;
    uint32_t in_bytes, out_first, out_last;
    char identity[IDENTITY_BYTES_MAX];
    uint64_t sent_ns[WINDOW_MAX];
    unsigned char in[IN_BYTES], out[OUT_BYTES];
};

static struct {
    struct sockaddr_in peer;
    bool mqtt, subscribe, hold;
    uint32_t clients, count, window, size;
    double rate;
} option = {.clients = 1, .count = 1, .window = 100, .size = 100};

static struct {
    SSL_CTX *context;
    int epoll;
    struct connection *connections; /* the last one is the subscriber */
    uint32_t answered, received;
    uint32_t *latencies_us;
    uint64_t idle_ns;
    char payload[PAYLOAD_BYTES_MAX];
} run;

static void fail(const struct connection *c, const char *why)
{
    unsigned long code = ERR_peek_error();

    fprintf(stderr, "messages: %s: %s (%u of %u answered, errno %d, %s)\n", c->identity, why, c->answered, c->quota,
            errno, code ? ERR_reason_error_string(code) : "no TLS error");
    exit(1);
}

/* --- packets ------------------------------------------------------------------------------------------------------- */

static uint32_t put_text(unsigned char *at, const char *text)
{
    uint32_t length = (uint32_t)strlen(text);

    at[0] = (unsigned char)(length >> 8);
    at[1] = (unsigned char)length;
    memcpy(at + 2, text, length);
    return length + 2;
}

/* Fixed header and length (3.1.1 section 2.2.3); gives how many bytes they take. */
static uint32_t put_header(unsigned char *at, unsigned char first, uint32_t length)
{
    uint32_t used = 0;

    at[used++] = first;
    do {
        at[used++] = (unsigned char)((length & 0x7f) | (length > 0x7f ? 0x80 : 0));
        length >>= 7;
    } while (length);
    return used;
}

static void put_message(struct connection *c, uint64_t at_ns)
{
    unsigned char *out = c->out + c->out_last;
    uint32_t used = 0;

    if (option.mqtt) {
        unsigned char body[64];
        char topic[6 + IDENTITY_BYTES_MAX];
        uint32_t header;
        uint32_t identifier = c->sent % 65535 + 1;

        snprintf(topic, sizeof topic, "bench/%s", c->identity);
        header = put_text(body, topic);
        body[header++] = (unsigned char)(identifier >> 8);
        body[header++] = (unsigned char)identifier;
        used = put_header(out, 0x32, header + option.size);
        memcpy(out + used, body, header);
        used += header;
        memcpy(out + used, run.payload, option.size);
        used += option.size;
    } else {
        memcpy(out, run.payload, option.size);
        out[option.size] = '\n';
        used = option.size + 1;
    }
    c->out_last += used;
    c->sent_ns[c->sent++ % option.window] = at_ns;
}

/* --- input and output ---------------------------------------------------------------------------------------------- */

static bool waits(struct connection *c, int result, const char *what)
{
    int error = SSL_get_error(c->ssl, result);

    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
        fail(c, what);
    return true;
}

static void flush(struct connection *c)
{
    while (c->out_first < c->out_last) {
        uint32_t size = c->out_last - c->out_first;
        int result = SSL_write(c->ssl, c->out + c->out_first, (int)(size < RECORD_BYTES ? size : RECORD_BYTES));
        if (result <= 0) {
            waits(c, result, "write");
            return;
        }
        c->out_first += (uint32_t)result;
    }
    c->out_first = c->out_last = 0;
}

/* Send what may be sent; true when there was something. */
static bool send_more(struct connection *c, uint64_t now)
{
    uint32_t before = c->sent;

    if (c->out_last == 0) {
        while (c->sent < c->quota && c->sent - c->answered < option.window &&
               c->out_last + option.size + 128 < OUT_BYTES && (option.rate == 0 || c->due_ns <= now)) {
            put_message(c, option.rate == 0 ? now : c->due_ns);
            c->due_ns += option.rate == 0 ? 0 : (uint64_t)(1e9 * option.clients / option.rate);
        }
    }
    if (c->out_last == 0)
        return false;
    flush(c);
    return c->sent != before;
}

static void answer(struct connection *c, uint64_t now)
{
    if (c->answered == c->sent)
        fail(c, "an answer to nothing");
    run.latencies_us[run.answered++] = (uint32_t)((now - c->sent_ns[c->answered++ % option.window]) / 1000);
}

/* Take what is complete of c->in; gives how many bytes. */
static uint32_t take_lines(struct connection *c, uint64_t now)
{
    unsigned char *at = c->in, *end = c->in + c->in_bytes, *line_end;

    while ((line_end = memchr(at, '\n', (size_t)(end - at))) != NULL) {
        if (at[0] != 'o' || at[1] != 'k')
            fail(c, "another answer than ok");
        answer(c, now);
        at = line_end + 1;
    }
    return (uint32_t)(at - c->in);
}

static void acknowledge(struct connection *c, const unsigned char *publish)
{
    uint32_t topic = (uint32_t)(publish[0] << 8 | publish[1]);

    if (c->out_last + 4 > OUT_BYTES)
        flush(c);
    if (c->out_last + 4 > OUT_BYTES)
        fail(c, "the server does not read");
    c->out[c->out_last++] = 0x40;
    c->out[c->out_last++] = 2;
    memcpy(c->out + c->out_last, publish + 2 + topic, 2);
    c->out_last += 2;
    run.received++;
}

static uint32_t take_packets(struct connection *c, uint64_t now)
{
    uint32_t taken = 0;

    for (;;) {
        uint32_t at = taken + 1, length = 0, shift = 0;
        while (at < c->in_bytes && c->in[at] & 0x80) {
            length |= (uint32_t)(c->in[at++] & 0x7f) << shift;
            shift += 7;
        }
        if (at >= c->in_bytes)
            return taken;
        length |= (uint32_t)c->in[at++] << shift;
        if (at + length > c->in_bytes)
            return taken;
        if (c->in[taken] == 0x40)
            answer(c, now);
        else if ((c->in[taken] & 0xf6) == 0x32)
            acknowledge(c, c->in + at);
        else
            fail(c, "another packet than PUBACK or PUBLISH");
        taken = at + length;
    }
}

static void receive(struct connection *c)
{
    for (;;) {
        int result = SSL_read(c->ssl, c->in + c->in_bytes, (int)(IN_BYTES - c->in_bytes));
        uint32_t taken;
        uint64_t now = now_ns();

        if (result <= 0) {
            waits(c, result, "read");
            break;
        }
        c->in_bytes += (uint32_t)result;
        taken = option.mqtt ? take_packets(c, now) : take_lines(c, now);
        c->in_bytes -= taken;
        memmove(c->in, c->in + taken, c->in_bytes);
    }
    if (c->quota == 0)
        flush(c);
}

/* --- opening, one after the other ---------------------------------------------------------------------------------- */

static void exchange(struct connection *c, const unsigned char *packet, uint32_t size, unsigned char expected)
{
    unsigned char got[16];

    if (SSL_write(c->ssl, packet, (int)size) <= 0 || SSL_read(c->ssl, got, sizeof got) <= 0 || got[0] != expected)
        fail(c, "greeting");
}

static void greet(struct connection *c, bool subscribe)
{
    static const unsigned char connect_head[] = {0, 4, 'M', 'Q', 'T', 'T', 4, 2, 0, 60};
    unsigned char packet[128], body[96];
    uint32_t length, used;

    memcpy(body, connect_head, sizeof connect_head);
    length = sizeof connect_head + put_text(body + sizeof connect_head, c->identity);
    used = put_header(packet, 0x10, length);
    memcpy(packet + used, body, length);
    exchange(c, packet, used + length, 0x20);
    if (subscribe) {
        body[0] = 0;
        body[1] = 1;
        length = 2 + put_text(body + 2, "bench/#");
        body[length++] = 1;
        used = put_header(packet, 0x82, length);
        memcpy(packet + used, body, length);
        exchange(c, packet, used + length, 0x90);
    }
}

static void open_connection(struct connection *c, uint32_t device, uint32_t quota)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    int on = 1;

    snprintf(c->identity, sizeof c->identity, "dev-%07u", device);
    c->quota = quota;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    c->ssl = SSL_new(run.context);
    if (c->fd < 0 || c->ssl == NULL || !SSL_set_fd(c->ssl, c->fd))
        die("open");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    SSL_set_app_data(c->ssl, c->identity);
    SSL_set_mode(c->ssl, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    if (connect(c->fd, (struct sockaddr *)&option.peer, sizeof option.peer) < 0)
        die("connect");
    if (SSL_connect(c->ssl) != 1)
        fail(c, "handshake");
    if (option.mqtt)
        greet(c, quota == 0);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    if (epoll_ctl(run.epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
}

/* --- the run ------------------------------------------------------------------------------------------------------- */

static bool is_done(void)
{
    return run.answered == option.count && (!option.subscribe || run.received >= option.count);
}

static void work(void)
{
    struct epoll_event events[64];
    uint64_t started_ns = now_ns();

    for (uint32_t i = 0; i < option.clients; i++)
        run.connections[i].due_ns = started_ns + (option.rate == 0 ? 0 : (uint64_t)(1e9 * i / option.rate));
    while (!is_done()) {
        uint64_t now = now_ns();
        int ready = epoll_wait(run.epoll, events, 64, 0);
        bool busy = ready > 0;

        for (int i = 0; i < ready; i++)
            receive(events[i].data.ptr);
        for (uint32_t i = 0; i < option.clients; i++)
            busy |= send_more(&run.connections[i], now);
        if (!busy)
            run.idle_ns += now_ns() - now;
        if (now - started_ns > TIMEOUT_S * 1000000000ull)
            fail(&run.connections[0], "time-out");
    }
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void report(double wall_s)
{
    qsort(run.latencies_us, run.answered, sizeof *run.latencies_us, compare);
    printf("{\"count\": %u, \"received\": %u, \"wall_s\": %.6f, \"idle_s\": %.6f, \"p50_us\": %u, \"p99_us\": %u}\n",
           run.answered, run.received, wall_s, (double)run.idle_ns / 1e9, run.latencies_us[run.answered / 2],
           run.latencies_us[(uint32_t)(0.99 * (run.answered - 1))]);
    fflush(stdout);
}

static void usage(void)
{
    fputs("usage: messages --connect ADDRESS:PORT [--mqtt [--subscribe]] [--clients N] [--count N] [--window N] [--size N]\n"
          "                [--rate N] [--hold]\n"
          "  --count   messages in all; --size: bytes of each\n"
          "  --window  unanswered messages of a connection\n"
          "  --rate    messages per second in all; default: as fast as they are answered\n"
          "  --hold    keep the connections open until stdin ends\n",
          stderr);
    exit(2);
}

static void parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"connect", required_argument, NULL, 'c'}, {"mqtt", no_argument, NULL, 'm'},
        {"subscribe", no_argument, NULL, 'u'},     {"clients", required_argument, NULL, 'n'},
        {"count", required_argument, NULL, 'N'},   {"window", required_argument, NULL, 'w'},
        {"size", required_argument, NULL, 's'},    {"rate", required_argument, NULL, 'r'},
        {"hold", no_argument, NULL, 'h'},          {NULL, 0, NULL, 0},
    };
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (name) {
        case 'c': parse_peer(optarg, &option.peer); break;
        case 'm': option.mqtt = true; break;
        case 'u': option.subscribe = true; break;
        case 'n': option.clients = number(optarg, 1, CLIENTS_MAX); break;
        case 'N': option.count = number(optarg, 1, COUNT_MAX); break;
        case 'w': option.window = number(optarg, 1, WINDOW_MAX); break;
        case 's': option.size = number(optarg, 1, PAYLOAD_BYTES_MAX); break;
        case 'r': option.rate = number(optarg, 1, COUNT_MAX); break;
        case 'h': option.hold = true; break;
        default: usage();
        }
    }
    if (optind != argc || option.peer.sin_port == 0 || option.count % option.clients)
        usage();
}

int main(int argc, char **argv)
{
    uint64_t started_ns;

    parse_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    memset(run.payload, 'x', sizeof run.payload);
    run.context = make_context("PSK-AES128-GCM-SHA256", false);
    run.epoll = epoll_create1(EPOLL_CLOEXEC);
    run.connections = calloc(option.clients + 1, sizeof *run.connections);
    run.latencies_us = calloc(option.count, sizeof *run.latencies_us);
    if (run.epoll < 0 || run.connections == NULL || run.latencies_us == NULL)
        die("start");
    if (option.subscribe)
        open_connection(&run.connections[option.clients], option.clients, 0);
    for (uint32_t i = 0; i < option.clients; i++)
        open_connection(&run.connections[i], i, option.count / option.clients);
    printf("{\"ready\": %u}\n", option.clients);
    fflush(stdout);
    while (getchar() != '\n')
        ;
    started_ns = now_ns();
    work();
    report((double)(now_ns() - started_ns) / 1e9);
    while (option.hold && getchar() != EOF)
        ;
    return 0;
}
