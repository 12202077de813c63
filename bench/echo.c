/*
 * An echo service in plain TCP behind stream routes and stunnel: echo PORT. Cheap, and not measured.
 *
 * It closes when the other side has ended, as a service does that has nothing more to say. What the peer does not take is
 * kept in the one buffer of the connection, and nothing more is read meanwhile.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUFFER_BYTES = 64 * 1024, EVENTS_MAX = 256 };

struct connection {
    int fd;
    uint32_t first, last; /* what is still to be sent back */
    char buffer[BUFFER_BYTES];
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* True when everything is sent; false when the peer takes no more, or is gone. */
static bool flush(struct connection *c, bool *gone)
{
    while (c->first < c->last) {
        ssize_t sent = send(c->fd, c->buffer + c->first, c->last - c->first, MSG_NOSIGNAL);
        if (sent < 0) {
            *gone = errno != EAGAIN;
            return false;
        }
        c->first += (uint32_t)sent;
    }
    c->first = c->last = 0;
    return true;
}

static void serve(struct connection *c)
{
    bool gone = false;

    while (flush(c, &gone)) {
        ssize_t received = recv(c->fd, c->buffer, sizeof c->buffer, 0);
        if (received < 0 && errno == EAGAIN)
            return;
        if (received <= 0) {
            gone = true;
            break;
        }
        c->last = (uint32_t)received;
    }
    if (gone) {
        close(c->fd);
        free(c);
    }
}

static void accept_all(int listener, int epoll)
{
    int fd, on = 1;

    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = malloc(sizeof *c);
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};

        if (c == NULL)
            die("malloc");
        c->fd = fd;
        c->first = c->last = 0;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
            die("epoll_ctl");
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event events[EVENTS_MAX], event = {.events = EPOLLIN};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int epoll = epoll_create1(EPOLL_CLOEXEC), on = 1;

    if (argc != 2) {
        fputs("usage: echo PORT\n", stderr);
        return 2;
    }
    own.sin_port = htons((uint16_t)atoi(argv[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&own, sizeof own) < 0 || listen(listener, 4096) < 0 ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) < 0)
        die("listen");
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS_MAX, -1);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.ptr == NULL)
                accept_all(listener, epoll);
            else
                serve(events[i].data.ptr);
        }
    }
}
