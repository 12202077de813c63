/*
 * TLS-PSK handshake load: opens connections as a fleet of devices would, and measures.
 *
 * One process, one epoll, non-blocking sockets. Each connection is another device: identity "dev-%07d", key
 * SHA-256("bench" || identity), 32 bytes (bench/fleet.py derives the same). A connection goes through
 *
 *     connect -> handshake -> [one round trip of 64 bytes] -> [held] -> close_notify, FIN -> wait for the peer's end
 *
 * and the next one starts when the peer has ended too, so that --clients is what the server has in hand at any
 * time and the whole cost of a connection, its end included, falls into the measured interval. The FIN goes out
 * before the peer's, so the port that waits out TIME_WAIT is one of ours; to a server on 127.0.0.0/8 the source
 * address rotates over 250 loopback addresses, which gives each (address, port) pair minutes of rest.
 *
 * Sockets are registered once, edge-triggered: every state reads or writes until OpenSSL wants to wait.
 *
 * With --spin it asks epoll again and again instead of sleeping there. A real device is another machine: to send to it
 * costs the server no wake-up of a sleeping process, which on one machine is 10 us or more per write, and more so the
 * slower the server is, since a fast one finds the generator awake. What waiting awake takes is left out of cpu_s.
 *
 * Output: one line of JSON on stdout. With --hold a line {"held": N} comes first, when all are open.
 * Exit status: 0 all connections went well, 1 some failed (the first reasons are on stderr), 2 wrong usage.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client.h"

enum {
    PAYLOAD_BYTES = 64,
    DEVICES_MAX = 10000000, /* "dev-%07d" */
    CLIENTS_MAX = 65536,
    COUNT_MAX = 10000000,
    SOURCES = 250,     /* 127.0.0.2 to 127.0.0.251 */
    FAILURES_MAX = 20, /* then no further connection is opened */
    EVENTS_MAX = 256,
};

enum round_trip { NONE, ECHO, LINE };

enum state { FREE, HANDSHAKE, SENDING, RECEIVING, HELD, CLOSING };

struct connection {
    enum state state;
    struct connection *next; /* in the list of free ones */
    int fd;
    SSL *ssl;
    uint64_t started_ns;
    uint32_t received;
    char identity[IDENTITY_BYTES_MAX];
    char answer[PAYLOAD_BYTES];
};

static struct {
    struct sockaddr_in peer;
    const char *suite;
    bool tls13;
    enum round_trip round_trip;
    uint32_t clients;
    uint32_t count;
    uint32_t first;
    uint32_t devices;
    uint32_t stride;
    double timeout_s;
    double hold_s; /* 0: no hold */
    bool spin;
} option = {.suite = "PSK-AES128-GCM-SHA256", .clients = 1, .count = 1, .devices = 1000, .stride = 1, .timeout_s = 10};

static struct {
    int epoll;
    SSL_CTX *context;
    struct connection *connections, *free;
    uint32_t *latencies_us;
    uint32_t opened, succeeded, failed, orderly; /* totals */
    uint32_t active, held;                       /* now; a held connection is not active */
    uint64_t idle_ns;                            /* with nothing to do but to wait for the server */
    uint64_t spun_cpu_ns;                        /* CPU time of waiting awake */
    char payload[PAYLOAD_BYTES];
} run;

static volatile sig_atomic_t released; /* SIGTERM or SIGINT: stop holding, open no more */

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void on_signal(int number)
{
    (void)number;
    released = 1;
}

/* --- one connection --------------------------------------------------------------------------------------- */

static void drive(struct connection *c);

static void give_back(struct connection *c)
{
    c->state = FREE;
    c->next = run.free;
    run.free = c;
}

static void release(struct connection *c)
{
    SSL_free(c->ssl);
    close(c->fd);
    if (c->state == HELD)
        run.held--;
    else
        run.active--;
    give_back(c);
}

static void fail(struct connection *c, const char *why)
{
    static const char *const states[] = {"free", "handshake", "sending", "receiving", "held", "closing"};
    unsigned long code = ERR_peek_error();

    if (run.failed++ < 5)
        fprintf(stderr, "load: %s: %s in state %s: %s\n", c->identity, why, states[c->state],
                code ? ERR_reason_error_string(code) : errno ? strerror(errno) : "end of stream");
    release(c);
}

static int open_socket(uint32_t number)
{
    struct sockaddr_in source = {.sin_family = AF_INET};
    uint32_t loopback = INADDR_LOOPBACK & 0xff000000u;
    int on = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    if (fd < 0)
        die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if ((ntohl(option.peer.sin_addr.s_addr) & 0xff000000u) == loopback) {
        source.sin_addr.s_addr = htonl(loopback + 2 + number % SOURCES);
        /* the port is chosen at connect, for the whole four-tuple */
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
            die("bind");
    }
    return fd;
}

static uint32_t device_of(uint32_t number)
{
    return (uint32_t)((option.first + (uint64_t)number * option.stride) % option.devices);
}

static void open_connection(void)
{
    struct connection *c = run.free;
    uint32_t number = run.opened++;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};

    run.free = c->next;
    run.active++;
    snprintf(c->identity, sizeof c->identity, "dev-%07u", device_of(number));
    c->fd = open_socket(number);
    c->received = 0;
    c->state = HANDSHAKE;
    c->ssl = SSL_new(run.context);
    if (c->ssl == NULL || !SSL_set_fd(c->ssl, c->fd))
        die("SSL_new");
    SSL_set_app_data(c->ssl, c->identity);
    SSL_set_connect_state(c->ssl);
    c->started_ns = now_ns();
    if (connect(c->fd, (struct sockaddr *)&option.peer, sizeof option.peer) < 0 && errno != EINPROGRESS) {
        fail(c, "connect");
        return;
    }
    if (epoll_ctl(run.epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
    drive(c);
}

/* True when OpenSSL only waits for the socket; otherwise the connection has failed and is released. */
static bool waits(struct connection *c, int result, const char *what)
{
    int error = SSL_get_error(c->ssl, result);

    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        return true;
    fail(c, what);
    return false;
}

static void record_latency(const struct connection *c)
{
    run.latencies_us[run.succeeded++] = (uint32_t)((now_ns() - c->started_ns) / 1000);
}

static void start_close(struct connection *c)
{
    c->state = CLOSING;
    SSL_shutdown(c->ssl);
    shutdown(c->fd, SHUT_WR);
}

static void after_work(struct connection *c)
{
    record_latency(c);
    if (option.hold_s > 0 && !released) {
        c->state = HELD;
        run.active--;
        run.held++;
    } else {
        start_close(c);
    }
}

static bool handshake(struct connection *c)
{
    int result = SSL_do_handshake(c->ssl);

    if (result != 1) {
        waits(c, result, "handshake");
        return false;
    }
    if (strcmp(SSL_get_cipher_name(c->ssl), option.suite) != 0) {
        fail(c, "another suite was negotiated");
        return false;
    }
    if (option.tls13 && !SSL_session_reused(c->ssl)) { /* how OpenSSL tells a PSK from a certificate in 1.3 */
        fail(c, "no PSK was used");
        return false;
    }
    if (option.round_trip == NONE)
        after_work(c);
    else
        c->state = SENDING;
    return true;
}

static bool send_payload(struct connection *c)
{
    int result = SSL_write(c->ssl, run.payload, PAYLOAD_BYTES);

    if (result <= 0) {
        waits(c, result, "write");
        return false;
    }
    c->state = RECEIVING;
    return true;
}

static bool receive_answer(struct connection *c)
{
    static const char acknowledged[] = "ok 1\n";
    const char *expected = option.round_trip == ECHO ? run.payload : acknowledged;
    uint32_t length = option.round_trip == ECHO ? PAYLOAD_BYTES : sizeof acknowledged - 1;
    int result = SSL_read(c->ssl, c->answer + c->received, (int)(length - c->received));

    if (result <= 0) {
        waits(c, result, "read");
        return false;
    }
    c->received += (uint32_t)result;
    if (c->received < length)
        return true;
    if (memcmp(c->answer, expected, length) != 0) {
        fail(c, "another answer than expected");
        return false;
    }
    after_work(c);
    return true;
}

/* A held session reads only to take in what TLS 1.3 sends after the handshake, and to notice a peer that ends. */
static bool hold(struct connection *c)
{
    int result = SSL_read(c->ssl, c->answer, PAYLOAD_BYTES);

    if (result <= 0) {
        waits(c, result, "held");
        return false;
    }
    return true;
}

static bool wait_for_end(struct connection *c)
{
    int result = SSL_read(c->ssl, c->answer, PAYLOAD_BYTES);
    int error;

    if (result > 0)
        return true;
    error = SSL_get_error(c->ssl, result);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        return false;
    /* An end without close_notify is told apart in the output; it is the server's manners, not a failure. */
    run.orderly += error == SSL_ERROR_ZERO_RETURN;
    release(c);
    return false;
}

static void drive(struct connection *c)
{
    bool more = true;

    while (more && c->state != FREE) {
        ERR_clear_error();
        errno = 0;
        switch (c->state) {
        case FREE:
            break;
        case HANDSHAKE:
            more = handshake(c);
            break;
        case SENDING:
            more = send_payload(c);
            break;
        case RECEIVING:
            more = receive_answer(c);
            break;
        case HELD:
            more = hold(c);
            break;
        case CLOSING:
            more = wait_for_end(c);
            break;
        }
    }
}

/* --- the run -------------------------------------------------------------------------------------------------- */

static bool may_open(void)
{
    return run.opened < option.count && run.failed < FAILURES_MAX && !released;
}

/* As many as clients, or one for each connection when all of them are held. */
static uint32_t slots(void)
{
    return option.hold_s > 0 ? option.count : option.clients;
}

static void fail_overdue(void)
{
    uint64_t now = now_ns();

    for (uint32_t i = 0; i < slots(); i++) {
        struct connection *c = &run.connections[i];
        if (c->state == FREE || c->state == HELD)
            continue;
        if ((double)(now - c->started_ns) > option.timeout_s * 1e9) {
            ERR_clear_error();
            errno = ETIMEDOUT;
            fail(c, "time-out");
        }
    }
}

/* Wait for the server, awake or asleep. What is held needs no spinning: nothing is measured meanwhile. */
static int idle(struct epoll_event *events, int timeout_ms)
{
    uint64_t started_ns = now_ns(), started_cpu_ns = cpu_ns();
    uint64_t until_ns = started_ns + (uint64_t)timeout_ms * 1000000u;
    int ready;

    if (option.spin && run.active > 0) {
        do
            ready = epoll_wait(run.epoll, events, EVENTS_MAX, 0);
        while (ready == 0 && now_ns() < until_ns);
        run.spun_cpu_ns += cpu_ns() - started_cpu_ns;
    } else {
        ready = epoll_wait(run.epoll, events, EVENTS_MAX, timeout_ms);
    }
    run.idle_ns += now_ns() - started_ns;
    return ready;
}

static void dispatch(int timeout_ms)
{
    struct epoll_event events[EVENTS_MAX];
    int ready = epoll_wait(run.epoll, events, EVENTS_MAX, 0);

    if (ready == 0)
        ready = idle(events, timeout_ms);
    if (ready < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < ready; i++)
        drive(events[i].data.ptr);
}

static void end_held(void)
{
    for (uint32_t i = 0; i < slots(); i++) {
        struct connection *c = &run.connections[i];
        if (c->state != HELD)
            continue;
        run.held--;
        run.active++;
        c->started_ns = now_ns();
        start_close(c);
        drive(c);
    }
}

static void announce_held(void)
{
    printf("{\"held\": %u}\n", run.held);
    fflush(stdout);
}

static void work(void)
{
    uint64_t checked_ns = now_ns(), held_ns = 0;

    while (run.active || run.held || may_open()) {
        while (run.active < option.clients && may_open())
            open_connection();
        if (run.active == 0 && run.held > 0 && held_ns == 0) {
            held_ns = now_ns();
            announce_held();
        }
        if (held_ns && (double)(now_ns() - held_ns) > option.hold_s * 1e9)
            released = 1;
        if (released && run.held > 0)
            end_held();
        if (run.active || run.held)
            dispatch(100);
        if (now_ns() - checked_ns > 500000000u) {
            checked_ns = now_ns();
            fail_overdue();
        }
    }
}

/* --- report ---------------------------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t quantile(double share)
{
    return run.succeeded ? run.latencies_us[(uint32_t)(share * (run.succeeded - 1) + 0.5)] : 0;
}

static void report(double wall_s)
{
    double cpu_s = (double)(cpu_ns() - run.spun_cpu_ns) / 1e9;

    qsort(run.latencies_us, run.succeeded, sizeof *run.latencies_us, compare);
    printf("{\"count\": %u, \"failures\": %u, \"orderly\": %u, \"wall_s\": %.6f, \"cpu_s\": %.6f, "
           "\"idle_s\": %.6f, \"p50_us\": %u, \"p99_us\": %u, \"p999_us\": %u, \"max_us\": %u}\n",
           run.succeeded, run.failed, run.orderly, wall_s, cpu_s, (double)run.idle_ns / 1e9, quantile(0.5), quantile(0.99), quantile(0.999),
           quantile(1));
}

/* --- options ----------------------------------------------------------------------------------------------------- */

static void usage(void)
{
    fputs("usage: load --connect ADDRESS:PORT [--suite NAME] [--clients N] [--count N] [--first N] [--devices N]\n"
          "            [--stride N] [--round-trip echo|line] [--hold SECONDS] [--timeout SECONDS] [--spin]\n"
          "       load --version\n"
          "  --suite      PSK-AES128-GCM-SHA256 (default), another TLS 1.2 suite of OpenSSL, or TLS_... for TLS 1.3\n"
          "  --clients    connections at a time\n"
          "  --count      connections in all\n"
          "  --first      number of the first device; --devices: numbers wrap there\n"
          "  --stride     from one device to the next, default 1\n"
          "  --round-trip send 64 bytes and wait for the same (echo) or, as a line, for `ok 1` (line)\n"
          "  --hold       keep all connections open for so long, or until SIGTERM\n"
          "  --spin       never sleep, so that the server need not wake us\n",
          stderr);
    exit(2);
}

static double seconds(const char *text)
{
    char *end;
    double value = strtod(text, &end);

    if (end == text || *end || !(value > 0 && value <= 86400))
        usage();
    return value;
}

static enum round_trip parse_round_trip(const char *text)
{
    if (strcmp(text, "echo") == 0)
        return ECHO;
    if (strcmp(text, "line") != 0)
        usage();
    return LINE;
}

static void parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"connect", required_argument, NULL, 'c'}, {"suite", required_argument, NULL, 's'},
        {"clients", required_argument, NULL, 'n'}, {"count", required_argument, NULL, 'N'},
        {"first", required_argument, NULL, 'f'},   {"devices", required_argument, NULL, 'd'},
        {"stride", required_argument, NULL, 'D'},
        {"round-trip", required_argument, NULL, 'r'}, {"hold", required_argument, NULL, 'h'},
        {"timeout", required_argument, NULL, 't'}, {"spin", no_argument, NULL, 'S'},
        {"version", no_argument, NULL, 'v'},
        {NULL, 0, NULL, 0},
    };
    int name;

    while ((name = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (name) {
        case 'c': parse_peer(optarg, &option.peer); break;
        case 's': option.suite = optarg; break;
        case 'n': option.clients = number(optarg, 1, CLIENTS_MAX); break;
        case 'N': option.count = number(optarg, 1, COUNT_MAX); break;
        case 'f': option.first = number(optarg, 0, DEVICES_MAX - 1); break;
        case 'd': option.devices = number(optarg, 1, DEVICES_MAX); break;
        case 'D': option.stride = number(optarg, 1, DEVICES_MAX); break;
        case 'r': option.round_trip = parse_round_trip(optarg); break;
        case 'h': option.hold_s = seconds(optarg); break;
        case 't': option.timeout_s = seconds(optarg); break;
        case 'S': option.spin = true; break;
        case 'v': puts(OpenSSL_version(OPENSSL_VERSION)); exit(0);
        default: usage();
        }
    }
    if (optind != argc || option.peer.sin_port == 0)
        usage();
    option.tls13 = strncmp(option.suite, "TLS_", 4) == 0;
}

int main(int argc, char **argv)
{
    struct sigaction on_end = {.sa_handler = on_signal};
    struct rlimit files;
    uint64_t started_ns;

    parse_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    sigaction(SIGTERM, &on_end, NULL);
    sigaction(SIGINT, &on_end, NULL);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    memset(run.payload, 'x', PAYLOAD_BYTES);
    run.payload[PAYLOAD_BYTES - 1] = '\n';
    run.context = make_context(option.suite, option.tls13);
    run.epoll = epoll_create1(EPOLL_CLOEXEC);
    run.connections = calloc(slots(), sizeof *run.connections);
    run.latencies_us = calloc(option.count, sizeof *run.latencies_us);
    if (run.epoll < 0 || run.connections == NULL || run.latencies_us == NULL)
        die("start");
    for (uint32_t i = slots(); i-- > 0;)
        give_back(&run.connections[i]);

    started_ns = now_ns();
    work();
    report((double)(now_ns() - started_ns) / 1e9);
    return run.failed || run.succeeded < option.count ? 1 : 0;
}
