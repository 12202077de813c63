from gateway.token_bucket import TokenBucket


class TestTokenBucket:
    def test_lets_the_rate_through(self) -> None:
        bucket = TokenBucket(2, 4, 0.0)
        for _ in range(4):
            assert bucket.has(1, 0.0)
            bucket.take(1)
        assert not bucket.has(1, 0.4)
        assert bucket.has(1, 0.5)
        bucket.take(1)
        assert bucket.has(4, 100.0)
        assert not bucket.has(4.1, 1000.0)
