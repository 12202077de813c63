/* What the load generators share: clocks, the fleet's keys (bench/fleet.py derives the same), options. */
#ifndef BENCH_CLIENT_H
#define BENCH_CLIENT_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <openssl/err.h>
#include <openssl/sha.h>
#include <openssl/ssl.h>

enum { IDENTITY_BYTES_MAX = 32 };

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "failed");
    ERR_print_errors_fp(stderr);
    exit(1);
}

/* The identity is the SSL object's application data. Also what OpenSSL asks for a TLS 1.3 PSK (bound to SHA-256) when no
 * session callback is set. */
static unsigned int answer_psk(SSL *ssl, const char *hint, char *identity, unsigned int identity_max,
                               unsigned char *key, unsigned int key_max)
{
    (void)hint;
    const char *own = SSL_get_app_data(ssl);
    size_t length = strlen(own);
    char text[5 + IDENTITY_BYTES_MAX] = "bench";

    if (length >= identity_max || key_max < SHA256_DIGEST_LENGTH)
        return 0;
    memcpy(identity, own, length + 1);
    memcpy(text + 5, own, length);
    SHA256((const unsigned char *)text, 5 + length, key);
    return SHA256_DIGEST_LENGTH;
}

static SSL_CTX *make_context(const char *suite, bool tls13)
{
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    int version = tls13 ? TLS1_3_VERSION : TLS1_2_VERSION;
    int chosen;

    if (context == NULL)
        die("SSL_CTX_new");
    chosen = tls13 ? SSL_CTX_set_ciphersuites(context, suite) : SSL_CTX_set_cipher_list(context, suite);
    if (!chosen || !SSL_CTX_set_min_proto_version(context, version) ||
        !SSL_CTX_set_max_proto_version(context, version) || !SSL_CTX_set1_groups_list(context, "X25519"))
        die(suite);
    SSL_CTX_set_psk_client_callback(context, answer_psk);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_options(context, SSL_OP_NO_TICKET);
    SSL_CTX_set_read_ahead(context, 1); /* one read per flight instead of two per record */
    return context;
}

/* --- options; usage() is the program's own ---------------------------------------------------------------------- */

static void usage(void);

static uint32_t number(const char *text, uint32_t low, uint32_t high)
{
    char *end;
    unsigned long value;

    errno = 0;
    value = strtoul(text, &end, 10);
    if (errno || end == text || *end || value < low || value > high)
        usage();
    return (uint32_t)value;
}

static void parse_peer(char *text, struct sockaddr_in *peer)
{
    char *colon = strrchr(text, ':');

    if (colon == NULL)
        usage();
    *colon = '\0';
    peer->sin_family = AF_INET;
    peer->sin_port = htons((uint16_t)number(colon + 1, 1, 65535));
    if (inet_pton(AF_INET, text, &peer->sin_addr) != 1)
        usage();
}

#endif
