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

    def test_admits_one_by_one(self) -> None:
        bucket = TokenBucket(1, 2, 0.0)
        assert [bucket.admits(at) for at in (0.0, 0.0, 0.0, 0.9, 1.0, 1.0)] == [
            True,
            True,
            False,
            False,
            True,
            False,
        ]
