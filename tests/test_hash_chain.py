"""Equal hashes mean equal prefixes of equal meaning; hashing is incremental and the same in every process."""

import hashlib
import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.errors import ConfigError, RequestError
from jaxkv.hash_chain import HASH_NAME, ChainRoot, HashChain
from jaxkv.key_parts import CacheKeyParts, MultiModalInput, PromptEmbeddings

ROOT = ChainRoot("model", 4)
TEXT = st.text("ab", max_size=2)
NAME = st.none() | st.text("ab", min_size=1, max_size=2)
ROOTS = st.builds(ChainRoot, TEXT, st.integers(1, 3), TEXT, st.sampled_from(["blake2b-128", "blake2b-256"]))
TOKENS = st.lists(st.integers(-1, 2), max_size=9)


@st.composite
def spans(draw, make):
    """Disjoint spans of a prompt, in order, each what ``make(first, length)`` draws."""
    cuts = sorted(draw(st.sets(st.integers(0, 9), max_size=4)))
    return tuple(
        draw(make(first, end - first)) for first, end in itertools.pairwise(cuts) if draw(st.booleans())
    )


INPUTS = spans(
    lambda first, length: st.builds(
        MultiModalInput, st.sampled_from(["x", "y"]), st.just(first), st.just(length)
    )
)
EMBEDDINGS = spans(
    lambda first, length: st.builds(
        PromptEmbeddings,
        st.just(first),
        st.lists(st.sampled_from([b"p", b"q", b"pq"]), min_size=length, max_size=length).map(tuple),
    )
)


@st.composite
def parts(draw):
    lora_name = draw(NAME)
    revision = draw(TEXT) if lora_name is not None else ""
    return CacheKeyParts(draw(NAME), lora_name, revision, draw(INPUTS), draw(EMBEDDINGS))


def meaning(root, key_parts, tokens, end):
    """What decides the cached bytes of the first ``end`` tokens."""
    rows = {
        part.first_token + place: digest
        for part in key_parts.embeddings
        for place, digest in enumerate(part.row_digests)
        if part.first_token + place < end
    }
    inputs = [part for part in key_parts.inputs if part.first_token < end]
    request = (key_parts.cache_salt, key_parts.lora_name, key_parts.lora_revision)
    return root, request, tokens[:end], inputs, rows


@given(ROOTS, parts(), TOKENS, st.data())
def test_two_requests_share_a_hash_only_where_it_means_the_same(root, key_parts, tokens, data):
    other_root = data.draw(st.just(root) | ROOTS)
    other_parts = data.draw(
        st.just(key_parts)
        | parts()
        | st.builds(lambda inputs: replace(key_parts, inputs=inputs), INPUTS)
        | st.builds(lambda rows: replace(key_parts, embeddings=rows), EMBEDDINGS)
        | st.builds(lambda salt: replace(key_parts, cache_salt=salt), NAME)
    )
    other_tokens = data.draw(st.just(tokens) | TOKENS)
    ours = HashChain(root, key_parts, tokens).block_hashes
    theirs = HashChain(other_root, other_parts, other_tokens).block_hashes
    found = {}
    for hashes, about in (
        (ours, (root, key_parts, tokens)),
        (theirs, (other_root, other_parts, other_tokens)),
    ):
        for place, block_hash in enumerate(hashes):
            means = meaning(*about, (place + 1) * about[0].tokens_per_hash)
            assert found.setdefault(block_hash, means) == means


@given(parts(), TOKENS, st.data())
def test_hashes_do_not_depend_on_how_tokens_arrive(key_parts, tokens, data):
    chain = HashChain(ROOT, key_parts)
    hashes, taken = chain.block_hashes, 0
    while taken < len(tokens):
        count = data.draw(st.integers(1, len(tokens) - taken))
        chain.extend(tokens[taken : taken + count])
        taken += count
        assert chain.num_tokens == taken
        assert len(hashes) == taken // 4
    assert hashes is chain.block_hashes
    assert hashes == HashChain(ROOT, key_parts, np.array(tokens, np.int64)).block_hashes


@given(parts(), parts(), TOKENS, TOKENS)
def test_parts_behind_a_block_do_not_change_its_hash(first, second, prefix, rest):
    def later(key_parts, start):
        inputs = tuple(replace(part, first_token=part.first_token + start) for part in key_parts.inputs)
        rows = tuple(replace(part, first_token=part.first_token + start) for part in key_parts.embeddings)
        return CacheKeyParts(inputs=inputs, embeddings=rows)

    start = len(prefix) // 4 * 4
    ours = HashChain(ROOT, later(first, start), prefix + rest).block_hashes
    theirs = HashChain(ROOT, later(second, start), prefix).block_hashes
    assert ours[: start // 4] == theirs[: start // 4]


CASES = {
    "fingerprint": ChainRoot("other", 4),
    "tenant": ChainRoot("model", 4, "tenant"),
    "hash name": ChainRoot("model", 4, hash_name="blake2b-256"),
    "link length": ChainRoot("model", 2),
    "a letter moved from fingerprint to salt": ChainRoot("mode", 4, "l"),
    "salt": CacheKeyParts(cache_salt="s"),
    "salt that is another's adapter": CacheKeyParts(cache_salt="a"),
    "adapter": CacheKeyParts(lora_name="a"),
    "adapter revision": CacheKeyParts(lora_name="a", lora_revision="2"),
    "image": CacheKeyParts(inputs=(MultiModalInput("cat", 1, 2),)),
    "another image": CacheKeyParts(inputs=(MultiModalInput("dog", 1, 2),)),
    "image elsewhere": CacheKeyParts(inputs=(MultiModalInput("cat", 2, 2),)),
    "longer image": CacheKeyParts(inputs=(MultiModalInput("cat", 1, 3),)),
    "image twice": CacheKeyParts(inputs=(MultiModalInput("cat", 1, 2), MultiModalInput("cat", 3, 2))),
    "embeddings": CacheKeyParts(embeddings=(PromptEmbeddings(1, (b"cat",)),)),
    "more embeddings": CacheKeyParts(embeddings=(PromptEmbeddings(1, (b"cat", b"cat")),)),
    "nothing": CacheKeyParts(),
}


def chain_of(case):
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    if isinstance(case, ChainRoot):
        return HashChain(case, token_ids=tokens).block_hashes
    return HashChain(ROOT, case, tokens).block_hashes


@pytest.mark.parametrize("pair", list(itertools.combinations(CASES, 2)), ids=" | ".join)
def test_no_hash_is_shared_between(pair):
    first, second = (set(chain_of(CASES[name])) for name in pair)
    assert not first & second


def test_hashes_are_made_as_the_docs_say():
    # Keys outlive the process in shared and persistent tiers, so the bytes are part of the contract.
    def number(value):
        return struct.pack(">q", value)

    def packed(*fields):
        return number(len(fields)) + b"".join(number(len(field)) + field for field in fields)

    def digest(person, message):
        return hashlib.blake2b(message, digest_size=16, person=person).digest()

    request = packed(packed(b"salt"), packed(b"lora", b"1"))
    parent = digest(b"jaxkv root", packed(b"blake2b-128", b"model", b"tenant", b"2", request))
    image, rows = b"M" + packed(b"cat", number(2)), b"E" + packed(number(1), b"cat")
    first = digest(b"jaxkv link", parent + struct.pack("<2i", 1, -2) + image + number(1) + rows)
    second = digest(b"jaxkv link", first + struct.pack("<2i", 3, 4) + image + number(-1))
    third = digest(b"jaxkv link", second + struct.pack("<2i", 5, 6))

    key_parts = CacheKeyParts("salt", "lora", "1", CASES["image"].inputs, CASES["embeddings"].embeddings)
    chain = HashChain(ChainRoot("model", 2, "tenant"), key_parts, [1, -2, 3, 4, 5, 6, 7])
    assert chain.block_hashes == [first, second, third]


def test_digests_of_embeddings_are_the_same_in_every_process():
    rows = PromptEmbeddings.of_rows(np.arange(4, dtype="<f4").reshape(2, 2)).row_digests
    assert [row.hex() for row in rows] == [
        "6d8777cf59550bd3388100606fa8f075",
        "464283d9c7cacff53a49dd752966ab33",
    ]


def test_hashes_are_as_long_as_their_name_says():
    assert HASH_NAME == "blake2b-128"
    assert {len(h) for h in HashChain(ROOT, token_ids=range(8)).block_hashes} == {16}
    wide = replace(ROOT, hash_name="blake2b-256")
    assert {len(h) for h in HashChain(wide, token_ids=range(8)).block_hashes} == {32}


@pytest.mark.parametrize(
    "tokens",
    [(1, 2, 3, 4), range(1, 5), np.array([1, 2, 3, 4], np.uint8), np.arange(8)[::2] // 2 + 1],
    ids=["tuple", "range", "uint8", "strided"],
)
def test_any_kind_of_token_list_gives_the_same_hashes(tokens):
    assert (
        HashChain(ROOT, token_ids=tokens).block_hashes == HashChain(ROOT, token_ids=[1, 2, 3, 4]).block_hashes
    )


@pytest.mark.parametrize(
    "tokens",
    [[2**31], [1.5], ["a"], np.array([2**31]), np.array([1.0]), np.array([[1]]), np.array([-(2**40)])],
    ids=repr,
)
def test_what_is_no_token_is_refused_and_changes_nothing(tokens):
    chain = HashChain(ROOT, token_ids=[1, 2, 3])
    with pytest.raises(RequestError, match="token ids"):
        chain.extend(tokens)
    chain.extend([4])
    assert chain.block_hashes == HashChain(ROOT, token_ids=[1, 2, 3, 4]).block_hashes


@pytest.mark.parametrize(
    ("options", "named"),
    [({"tokens_per_hash": 0}, "tokens_per_hash.*0"), ({"hash_name": "md5"}, "'md5'.*blake2b-128")],
)
def test_a_root_that_cannot_work_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        replace(ROOT, **options)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: CacheKeyParts(cache_salt=""), "cache_salt.*''"),
        (lambda: CacheKeyParts(cache_salt=3), "cache_salt.*3"),
        (lambda: CacheKeyParts(lora_name=""), "lora_name"),
        (lambda: CacheKeyParts(lora_revision="2"), "lora_revision.*'2'.*lora_name"),
        (lambda: CacheKeyParts(inputs=[MultiModalInput("x", 0, 1)]), "inputs.*tuple"),
        (lambda: CacheKeyParts(embeddings=(MultiModalInput("x", 0, 1),)), "embeddings.*PromptEmbeddings"),
        (
            lambda: CacheKeyParts(inputs=(MultiModalInput("x", 0, 3), MultiModalInput("x", 2, 1))),
            "token 3.*at 2",
        ),
        (lambda: MultiModalInput("", 0, 1), "digest"),
        (lambda: MultiModalInput("x", -1, 1), "from -1"),
        (lambda: MultiModalInput("x", 0, 0), "0 tokens"),
        (lambda: PromptEmbeddings(0, ()), "0 tokens"),
        (lambda: PromptEmbeddings(0, ("x",)), "bytes"),
        (lambda: PromptEmbeddings.of_rows(np.zeros(3)), r"shape \(3,\)"),
    ],
)
def test_parts_that_mean_nothing_are_refused(make, named):
    with pytest.raises(RequestError, match=named):
        make()


def test_rows_of_embeddings_are_told_apart_by_value_dtype_and_width():
    rows = np.zeros((2, 4), np.float32)
    kinds = [rows, rows + 1, rows.astype(np.float16), rows.view(np.int32), rows[:, :2], rows.view(np.int64)]
    digests = [PromptEmbeddings.of_rows(kind).row_digests[0] for kind in kinds]
    assert len(set(digests)) == len(kinds)
    assert PromptEmbeddings.of_rows(rows[:, ::-1]) == PromptEmbeddings.of_rows(rows)


def test_events_tell_the_parts_of_a_chunk_alone():
    key_parts = CacheKeyParts(
        "salt", "lora", "1", CASES["image twice"].inputs, CASES["embeddings"].embeddings
    )
    assert key_parts.extra_keys(range(4)) == (
        ("lora", "lora", "1"),
        ("mm", "cat", 1),
        ("mm", "cat", 3),
        ("cache_salt", "salt"),
        ("prompt_embeds", 1, b"cat".hex()),
    )
    assert key_parts.extra_keys(range(4, 8)) == (("lora", "lora", "1"), ("mm", "cat", -1))
    assert CacheKeyParts().extra_keys(range(4)) == ()
