/*
 * Bytes over TLS-PSK that come back: round trips on open connections, and bulk.
 *
 * One process, one epoll, `--clients` connections that stay open, each another device of the fleet (bench/fleet.py). Each
 * sends `--bytes` in writes of `--write` bytes and has at most `--window` of them on the way; what comes back is compared.
 * With window = write a connection is one round trip after the other, else the next write waits for room alone. Latency is from
 * a write to the last byte of its echo.
 *
 * It opens everything, prints {"ready": N}, waits for a line on stdin, runs, and prints one line of JSON. With --hold it keeps
 * the connections open until stdin ends.
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
    CLIENTS_MAX = 4096,
    WRITE_BYTES_MAX = 16 * 1024,
    BYTES_MAX = 2000000000,
    IN_BYTES = 64 * 1024,
    WRITES_ON_THE_WAY_MAX = 1024,
    TIMEOUT_S = 240,
};

struct connection {
    SSL *ssl;
    int fd;
    uint64_t sent, received;
    char identity[IDENTITY_BYTES_MAX];
    uint64_t sent_ns[WRITES_ON_THE_WAY_MAX]; /* by number of the write */
};

static struct {
    struct sockaddr_in peer;
    bool hold;
    uint32_t clients, bytes, write, window;
} option = {.clients = 1, .bytes = 100, .write = 100, .window = 100};

static struct {
    SSL_CTX *context;
    int epoll;
    struct connection *connections;
    uint32_t finished, trips;
    uint32_t *latencies_us;
    uint64_t idle_ns;
    char payload[WRITE_BYTES_MAX], in[IN_BYTES];
} run;

static void fail(const struct connection *c, const char *why)
{
    unsigned long code = ERR_peek_error();

    fprintf(stderr, "stream: %s: %s (%llu sent, %llu received, errno %d, %s)\n", c->identity, why,
            (unsigned long long)c->sent, (unsigned long long)c->received, errno,
            code ? ERR_reason_error_string(code) : "no TLS error");
    exit(1);
}

static void check_waits(const struct connection *c, int result, const char *what)
{
    int error = SSL_get_error(c->ssl, result);

    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
        fail(c, what);
}

/* Writes are whole ones: without SSL_MODE_ENABLE_PARTIAL_WRITE OpenSSL takes all or asks for the same again. */
static void send_more(struct connection *c)
{
    while (c->sent < option.bytes && c->sent + option.write - c->received <= option.window) {
        uint64_t now = now_ns();
        int result = SSL_write(c->ssl, run.payload, (int)option.write);
        if (result <= 0) {
            check_waits(c, result, "write");
            return;
        }
        c->sent_ns[c->sent / option.write % WRITES_ON_THE_WAY_MAX] = now;
        c->sent += option.write;
    }
}

static void take(struct connection *c, uint32_t size)
{
    uint64_t before = c->received / option.write, now = now_ns();

    for (uint32_t first = 0, length; first < size; first += length) {
        uint32_t at = (uint32_t)((c->received + first) % option.write);
        length = option.write - at < size - first ? option.write - at : size - first;
        if (memcmp(run.in + first, run.payload + at, length) != 0)
            fail(c, "another byte than was sent");
    }
    c->received += size;
    if (c->received > c->sent)
        fail(c, "more than was sent");
    for (uint64_t each = before; each < c->received / option.write; each++)
        run.latencies_us[run.trips++] = (uint32_t)((now - c->sent_ns[each % WRITES_ON_THE_WAY_MAX]) / 1000);
    run.finished += c->received == option.bytes;
}

static void drive(struct connection *c)
{
    for (;;) {
        int result;

        ERR_clear_error();
        send_more(c);
        result = SSL_read(c->ssl, run.in, sizeof run.in);
        if (result <= 0) {
            check_waits(c, result, "read");
            return;
        }
        take(c, (uint32_t)result);
    }
}

static void work(void)
{
    struct epoll_event events[64];
    uint64_t started_ns = now_ns();

    for (uint32_t i = 0; i < option.clients; i++)
        drive(&run.connections[i]);
    while (run.finished < option.clients) {
        uint64_t now = now_ns();
        int ready = epoll_wait(run.epoll, events, 64, 0);

        if (ready == 0) { /* asleep: what echoes shares this core */
            ready = epoll_wait(run.epoll, events, 64, 100);
            run.idle_ns += now_ns() - now;
        }
        for (int i = 0; i < ready; i++)
            drive(events[i].data.ptr);
        if (now - started_ns > TIMEOUT_S * 1000000000ull)
            fail(&run.connections[0], "time-out");
    }
}

static void open_connection(struct connection *c, uint32_t device)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    int on = 1;

    snprintf(c->identity, sizeof c->identity, "dev-%07u", device);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    c->ssl = SSL_new(run.context);
    if (c->fd < 0 || c->ssl == NULL || !SSL_set_fd(c->ssl, c->fd))
        die("open");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    SSL_set_app_data(c->ssl, c->identity);
    if (connect(c->fd, (struct sockaddr *)&option.peer, sizeof option.peer) < 0)
        die("connect");
    if (SSL_connect(c->ssl) != 1)
        fail(c, "handshake");
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    if (epoll_ctl(run.epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t quantile(double share)
{
    return run.latencies_us[(uint32_t)(share * (run.trips - 1) + 0.5)];
}

static void report(double wall_s)
{
    qsort(run.latencies_us, run.trips, sizeof *run.latencies_us, compare);
    printf("{\"count\": %u, \"wall_s\": %.6f, \"idle_s\": %.6f, \"p50_us\": %u, \"p99_us\": %u, \"p999_us\": %u}\n",
           run.trips, wall_s, (double)run.idle_ns / 1e9, quantile(0.5), quantile(0.99), quantile(0.999));
    fflush(stdout);
}

static void usage(void)
{
    fputs("usage: stream --connect ADDRESS:PORT [--clients N] [--bytes N] [--write N] [--window N] [--hold]\n"
          "  --bytes   of each connection, a multiple of --write\n"
          "  --window  bytes of a connection that have not come back\n"
          "  --hold    keep the connections open until stdin ends\n",
          stderr);
    exit(2);
}

static void parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"connect", required_argument, NULL, 'c'}, {"clients", required_argument, NULL, 'n'},
        {"bytes", required_argument, NULL, 'b'},   {"write", required_argument, NULL, 's'},
        {"window", required_argument, NULL, 'w'},  {"hold", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (name) {
        case 'c': parse_peer(optarg, &option.peer); break;
        case 'n': option.clients = number(optarg, 1, CLIENTS_MAX); break;
        case 'b': option.bytes = number(optarg, 1, BYTES_MAX); break;
        case 's': option.write = number(optarg, 1, WRITE_BYTES_MAX); break;
        case 'w': option.window = number(optarg, 1, BYTES_MAX); break;
        case 'h': option.hold = true; break;
        default: usage();
        }
    }
    if (optind != argc || option.peer.sin_port == 0 || option.bytes % option.write || option.window < option.write ||
        option.window / option.write > WRITES_ON_THE_WAY_MAX)
        usage();
}

int main(int argc, char **argv)
{
    uint64_t started_ns;
    int byte;

    parse_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    for (uint32_t i = 0; i < sizeof run.payload; i++)
        run.payload[i] = (char)(i * 31 + i / 251);
    run.context = make_context("PSK-AES128-GCM-SHA256", false);
    run.epoll = epoll_create1(EPOLL_CLOEXEC);
    run.connections = calloc(option.clients, sizeof *run.connections);
    run.latencies_us = calloc((size_t)option.clients * (option.bytes / option.write), sizeof *run.latencies_us);
    if (run.epoll < 0 || run.connections == NULL || run.latencies_us == NULL)
        die("start");
    for (uint32_t i = 0; i < option.clients; i++)
        open_connection(&run.connections[i], i);
    printf("{\"ready\": %u}\n", option.clients);
    fflush(stdout);
    while ((byte = getchar()) != '\n' && byte != EOF)
        ;
    started_ns = now_ns();
    work();
    report((double)(now_ns() - started_ns) / 1e9);
    while (option.hold && getchar() != EOF)
        ;
    return 0;
}
