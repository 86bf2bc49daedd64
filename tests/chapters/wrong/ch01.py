"""Wrong solutions of chapter 01. ``# %%`` names each, its docstring the task and the mistake."""

# %% added_to_old_content
"""Task 1.1: K and V are added to what a slot held, which is right only for a slot that is still zero."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        rows = torch.arange(len(positions)).unsqueeze(1).expand_as(positions)
        self.keys[layer].index_put_((rows, positions), key, accumulate=True)
        self.values[layer].index_put_((rows, positions), value, accumulate=True)


# %% every_row_gets_all
"""Task 1.1: the batch axis is a slice, so that every sequence's row receives the tokens of all sequences."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        self.keys[layer, :, positions] = key
        self.values[layer, :, positions] = value


# %% first_positions_for_all
"""Task 1.1: all sequences are written at the positions of the first."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        self.keys[layer][:, positions[0]] = key
        self.values[layer][:, positions[0]] = value


# %% flat_without_row
"""Task 1.1: the flat index forgets where a sequence's own row begins."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        flat = positions.flatten()
        self.keys[layer].flatten(0, 1)[flat] = key.flatten(0, 1)
        self.values[layer].flatten(0, 1)[flat] = value.flatten(0, 1)


# %% row_stride_of_new_tokens
"""Task 1.1: the flat index takes the number of new tokens for the length of a row."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        batch_size, num_new = positions.shape
        for b in range(batch_size):
            for t in range(num_new):
                slot = b * num_new + positions[b, t]
                self.keys[layer].flatten(0, 1)[slot] = key[b, t]
                self.values[layer].flatten(0, 1)[slot] = value[b, t]


# %% cache_copied
"""Task 1.1: each write makes a new cache: a copy of all that it could hold."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        rows = torch.arange(len(positions)).unsqueeze(1)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        self.keys[layer, rows, positions] = key
        self.values[layer, rows, positions] = value


# %% layer_copied
"""Task 1.1: a write makes the whole layer anew from the old one and the new tokens."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        index = positions[:, :, None, None].expand_as(key)
        self.keys[layer] = self.keys[layer].scatter(1, index, key)
        self.values[layer] = self.values[layer].scatter(1, index, value)


# %% positions_shifted_in_place
"""Task 1.1: the caller's positions are turned into flat slots in place."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        max_len = self.keys.shape[2]
        positions += torch.arange(len(positions)).unsqueeze(1) * max_len
        self.keys[layer].flatten(0, 1)[positions.flatten()] = key.flatten(0, 1)
        self.values[layer].flatten(0, 1)[positions.flatten()] = value.flatten(0, 1)


# %% slots_kept_between_calls
"""Task 1.1: the flat slots are computed in the first layer and used for the others, and by the next step too."""


class ReservedCache:
    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        shape = tuple(positions.shape)
        self.plans = getattr(self, "plans", {})
        if shape not in self.plans:
            self.plans[shape] = positions.clone()
        positions = self.plans[shape]
        rows = torch.arange(len(positions)).unsqueeze(1)
        self.keys[layer, rows, positions] = key
        self.values[layer, rows, positions] = value


# %% cut_at_the_longest
"""Task 1.2: a decode cuts the cache at the longest sequence and masks nothing, so that shorter ones see past their end."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    length = int(positions.max()) + 1
    keys, values = keys[:, :length], values[:, :length]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    if query.shape[1] > 1:
        hidden = torch.arange(length) > positions[:, None, :, None]
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)


# %% mask_added_too_small
"""Task 1.2: a large negative number is added to hidden scores, which is too small if a slot holds something larger."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = torch.arange(keys.shape[1]) > positions.unsqueeze(-1)
    scores = scores + hidden.unsqueeze(1) * -1000.0
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)


# %% mask_after_softmax
"""Task 1.2: hidden slots are masked after the softmax, where a large score in one has already taken all the weight."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    visible = torch.arange(keys.shape[1]) <= positions.unsqueeze(-1)
    weights = scores.softmax(dim=-1) * visible.unsqueeze(1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


# %% mask_counts_rows
"""Task 1.2: the rows of a prefill are numbered from zero, so that new tokens after cached ones see too little."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    num_new, max_len = query.shape[1], keys.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    if num_new > 1:
        visible = torch.ones(num_new, max_len, dtype=torch.bool).tril()
    else:
        visible = (torch.arange(max_len) <= positions[:, :1])[:, None, None]
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


# %% mask_of_first_sequence
"""Task 1.2: one mask, made from the first sequence's positions, serves the whole batch."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = torch.arange(keys.shape[1])[None, :] > positions[0][:, None]
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)


# %% mask_without_head_axis
"""Task 1.2: the mask has no axis for heads, so that its batch axis is matched with the heads."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = torch.arange(keys.shape[1]) > positions.unsqueeze(-1)
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)


# %% new_tokens_see_each_other
"""Task 1.2: every new token sees as far as the newest one of its sequence."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    lengths = positions.amax(dim=1) + 1
    hidden = torch.arange(keys.shape[1]) >= lengths[:, None]
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)


# %% scale_ignored
"""Task 1.2: the scores are always divided by the root of head_dim, and the caller's scale is not used."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) / math.sqrt(query.shape[-1])
    hidden = torch.arange(keys.shape[1]) > positions.unsqueeze(-1)
    scores = scores.masked_fill(hidden.unsqueeze(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), values)


# %% exponent_without_maximum
"""Task 1.2: the softmax is written without subtracting the maximum."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = (torch.arange(keys.shape[1]) > positions.unsqueeze(-1)).unsqueeze(1)
    weights = scores.masked_fill(hidden, -math.inf).exp()
    return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(dim=-1, keepdim=True), values)


# %% maximum_before_the_mask
"""Task 1.2: the maximum is taken over hidden slots too, so that all visible weights can vanish."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = (torch.arange(keys.shape[1]) > positions.unsqueeze(-1)).unsqueeze(1)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp().masked_fill(hidden, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(dim=-1, keepdim=True), values)


# %% float32_softmax
"""Task 1.2: the softmax is computed in float32, whatever the dtype of the query."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = (torch.arange(keys.shape[1]) > positions.unsqueeze(-1)).unsqueeze(1)
    weights = scores.float().masked_fill(hidden, -math.inf).softmax(dim=-1).to(query.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


# %% filled_with_minus_1e9
"""Task 1.2: hidden slots get the score -1e9, which visible scores may be below."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = (torch.arange(keys.shape[1]) > positions.unsqueeze(-1)).unsqueeze(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -1e9).softmax(dim=-1), values)


# %% mask_kept_by_shape
"""Task 1.2: a mask is made once for each shape and used again for other positions of the same shape."""

MASKS = {}


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    key = tuple(positions.shape), keys.shape[1]
    if key not in MASKS:
        MASKS[key] = (torch.arange(keys.shape[1]) > positions.unsqueeze(-1)).unsqueeze(1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    weights = scores.masked_fill(MASKS[key], -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


# %% mask_kept_by_identity
"""Task 1.2: a mask is kept for a tensor of positions, though its numbers may have changed."""

MASKS_OF = {}


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    if id(positions) not in MASKS_OF:
        MASKS_OF[id(positions)] = positions, (torch.arange(keys.shape[1]) > positions.unsqueeze(-1)).unsqueeze(1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    weights = scores.masked_fill(MASKS_OF[id(positions)][1], -math.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


# %% single_heads_dropped
"""Task 1.2: axes of length one are squeezed away, heads among them."""


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
    hidden = (torch.arange(keys.shape[1]) > positions.unsqueeze(-1)).unsqueeze(1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -math.inf).softmax(dim=-1), values)
    return out.squeeze(2)


# %% first_row_for_all
"""Task 1.3: every text's last row is row 0."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    token_ids = torch.tensor([text[-1] for text in texts]).unsqueeze(1)
    positions = torch.tensor([len(text) - 1 for text in texts]).unsqueeze(1)
    return token_ids, positions, torch.zeros(len(texts), dtype=torch.int64)


# %% position_too_late
"""Task 1.3: a text of n tokens is continued at position n, which leaves a hole in the cache."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    token_ids = torch.tensor([[text[-1]] for text in texts])
    positions = torch.tensor([[len(text)] for text in texts])
    return token_ids, positions, torch.arange(len(texts))


# %% positions_of_the_longest
"""Task 1.3: all texts stand at the position of the longest, as if the padding were part of them."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(text) for text in texts)
    token_ids = torch.tensor([[text[-1]] for text in texts])
    positions = torch.full((len(texts), 1), longest - 1)
    return token_ids, positions, torch.arange(len(texts))


# %% token_zero_is_padding
"""Task 1.3: token 0 at a text's end is taken for padding and skipped."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = []
    for text in texts:
        length = len(text)
        while length > 1 and text[length - 1] == 0:
            length -= 1
        lengths.append(length)
    token_ids = torch.tensor([[text[length - 1]] for text, length in zip(texts, lengths)])
    positions = torch.tensor([[length - 1] for length in lengths])
    return token_ids, positions, torch.arange(len(texts))


# %% lists_only
"""Task 1.3: the texts are copied with list.copy, which tuples do not have."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    newest = [text.copy().pop() for text in texts]
    positions = torch.tensor([[len(text) - 1] for text in texts])
    return torch.tensor(newest).unsqueeze(1), positions, torch.arange(len(texts))


# %% rows_for_a_thousand_positions
"""Task 1.3: positions are counted modulo 1024, whatever the model's own limit."""


def decode_inputs(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    token_ids = torch.tensor([[text[-1]] for text in texts])
    positions = torch.tensor([[(len(text) - 1) % 1024] for text in texts])
    return token_ids, positions, torch.arange(len(texts))


# %% written_slots_counted
"""Task 1.4: all slots that were written are counted, those of stories that are over too."""


def answer_1_4() -> tuple[float, str]:
    return 33.5, "About a third of the slots is written on average, because the run ends before any text reaches its limit."


# %% share_of_one
"""Task 1.4: the share is a fraction, and not in percent."""


def answer_1_4() -> tuple[float, str]:
    return 0.171, "Most of the slots are reserved for tokens that never come, and some belong to stories that are over."


# %% number_alone
"""Task 1.4: the number is returned without a text."""


def answer_1_4() -> tuple[float, str]:
    return 17.1


# %% attention_cut_to_last_column
"""Task 1.2: the cache is cut behind the last column's position, though another query may stand further on."""


def masked_attention(query, keys, values, positions, scale):
    length = int(positions[:, -1].max()) + 1
    keys, values = keys[:, :length], values[:, :length]
    scores = torch.einsum("bthd,bshd->bhts", query, keys) * scale
    slots = torch.arange(length, device=positions.device)
    hidden = slots > positions[:, None, :, None]
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -math.inf).softmax(-1), values)


# %% one_token_more
"""Task 1.4: a text is counted with the token that the step chooses, though its K and V are not written yet."""


def answer_1_4() -> tuple[float, str]:
    return 17.27, "Most slots are reserved for tokens that never come, and a sixth belongs to stories that are over."


# %% one_step_more
"""Task 1.4: a text counts in the step after its last one too."""


def answer_1_4() -> tuple[float, str]:
    return 17.23, "Most slots are reserved for tokens that never come, and a sixth belongs to stories that are over."
