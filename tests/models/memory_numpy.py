"""NTM, DNC and NSM as their papers write them: one stream, float64, loops over heads and rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Weights = Mapping[str, NDArray]
Vector = NDArray[np.float64]


def sigmoid(x: Vector) -> Vector:
    return 1 / (1 + np.exp(-x))


def softplus(x: Vector) -> Vector:
    return np.log1p(np.exp(x))


def softmax(x: Vector) -> Vector:
    e = np.exp(x - x.max())
    return e / e.sum()


def elu(x: Vector) -> Vector:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def lstm(w: Weights, x: Vector, h: Vector, c: Vector) -> tuple[Vector, Vector]:
    i, f, g, o = np.split(w["controller.gates.weight"] @ np.concatenate([x, h]) + w["controller.gates.bias"], 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def content(M: Vector, k: Vector, beta: float) -> Vector:
    lengths = np.sqrt((M**2).sum(1)) * np.sqrt((k**2).sum())
    return softmax(beta * (M @ k) / (lengths + 1e-8))


class Ntm:
    """Graves et al. 2014, equations 3 to 9."""

    def __init__(self, w: Weights, n_read: int, n_write: int, n_rows: int, d_row: int) -> None:
        self.w, self.n_read, self.n_write, self.W = w, n_read, n_write, d_row
        self.M = np.full((n_rows, d_row), 1e-6)
        self.weights = [softmax(row) for row in w["first_weights"]]
        self.read, self.h, self.c = w["first_read"], w["first_h"], w["first_c"]

    def address(self, before: Vector, p: Vector) -> Vector:
        k, beta, g = np.tanh(p[: self.W]), softplus(p[self.W]), sigmoid(p[self.W + 1])
        s, gamma = softmax(p[self.W + 2 : self.W + 5]), 1 + softplus(p[self.W + 5])
        w, n = g * content(self.M, k, beta) + (1 - g) * before, len(before)
        moved = np.array([sum(s[j + 1] * w[(i + j) % n] for j in (-1, 0, 1)) for i in range(n)])
        return moved**gamma / (moved**gamma).sum()

    def step(self, x: Vector) -> Vector:
        self.h, self.c = lstm(self.w, np.concatenate([x, self.read]), self.h, self.c)
        heads = (self.w["address.weight"] @ self.h + self.w["address.bias"]).reshape(-1, self.W + 6)
        values = (self.w["write.weight"] @ self.h + self.w["write.bias"]).reshape(self.n_write, 2, self.W)
        for i in range(self.n_read):
            self.weights[i] = self.address(self.weights[i], heads[i])
        self.read = np.concatenate([self.weights[i] @ self.M for i in range(self.n_read)])
        for i in range(self.n_write):
            at = self.n_read + i
            w = self.weights[at] = self.address(self.weights[at], heads[at])
            erase, add = sigmoid(values[i, 0]), np.tanh(values[i, 1])
            for row in range(len(self.M)):
                self.M[row] = self.M[row] * (1 - w[row] * erase) + w[row] * add
        return self.w["out.weight"] @ np.concatenate([self.h, self.read]) + self.w["out.bias"]


def allocation(u: Vector) -> Vector:
    """The free list in order of usage, ties by index (Methods, dynamic memory allocation)."""
    a, product = np.zeros(len(u)), 1.0
    for row in sorted(range(len(u)), key=lambda i: (u[i], i)):
        a[row] = (1 - u[row]) * product
        product *= u[row]
    return a


class Dnc:
    """Graves et al. 2016, Methods."""

    def __init__(self, w: Weights, R: int, N: int, W: int, d: int) -> None:
        self.w, self.R, self.N, self.W = w, R, N, W
        self.M, self.L = np.zeros((N, W)), np.zeros((N, N))
        self.u, self.p, self.ww, self.wr = np.zeros(N), np.zeros(N), np.zeros(N), np.zeros((R, N))
        self.read, self.h, self.c = np.zeros(R * W), np.zeros(d), np.zeros(d)

    def step(self, x: Vector) -> Vector:
        R, N, W = self.R, self.N, self.W
        self.h, self.c = lstm(self.w, np.concatenate([x, self.read]), self.h, self.c)
        xi = self.w["interface.weight"] @ self.h + self.w["interface.bias"]
        cuts = np.cumsum([R * W, R, R, 3 * R, W, W, W, 1, 1])
        keys, strengths, free, modes, key, erase, value, strength, ga, gw = np.split(xi, cuts)
        psi = np.ones(N)
        for i in range(R):
            psi = psi * (1 - sigmoid(free[i]) * self.wr[i])
        self.u = (self.u + self.ww - self.u * self.ww) * psi
        c = content(self.M, key, 1 + softplus(strength[0]))
        ga, gw = sigmoid(ga[0]), sigmoid(gw[0])
        self.ww = gw * (ga * allocation(self.u) + (1 - ga) * c)
        for i in range(N):
            self.M[i] = self.M[i] * (1 - self.ww[i] * sigmoid(erase)) + self.ww[i] * value
        for i in range(N):
            for j in range(N):
                self.L[i, j] = (1 - self.ww[i] - self.ww[j]) * self.L[i, j] + self.ww[i] * self.p[j]
            self.L[i, i] = 0
        self.p = (1 - self.ww.sum()) * self.p + self.ww
        for i in range(R):
            m = softmax(modes[3 * i : 3 * i + 3])
            found = content(self.M, keys[i * W : (i + 1) * W], 1 + softplus(strengths[i]))
            self.wr[i] = m[0] * (self.L.T @ self.wr[i]) + m[1] * found + m[2] * (self.L @ self.wr[i])
        self.read = (self.wr @ self.M).reshape(-1)
        return self.w["out.weight"] @ np.concatenate([self.h, self.read]) + self.w["out.bias"]


class Nsm:
    """Hudson and Manning 2019, section 3.3, with the graph held fixed."""

    def __init__(self, w: Weights, nodes: Vector, edges: Vector, there: NDArray[np.bool_]) -> None:
        """nodes [n,P,d], edges [n,n,d], there [n]."""
        self.w, self.S, self.E, self.there = w, nodes, edges, there
        self.p = there / max(1, there.sum())

    def step(self, r: Vector) -> tuple[Vector, Vector]:
        (n, P, d), w = self.S.shape, self.w
        R = softmax(w["concepts"] @ r)
        W = [w["property.weight"][:, j * d : (j + 1) * d] for j in range(P)]
        state, relation = np.full(n, -np.inf), np.full(n, -np.inf)
        for s in np.flatnonzero(self.there):
            gamma = elu(sum(R[j] * (W[j] @ (r * self.S[s, j])) for j in range(P)))
            arrived = sum(self.p[t] * elu(w["relation.weight"] @ (r * self.E[t, s])) for t in range(n))
            state[s], relation[s] = w["state_score.weight"][0] @ gamma, w["relation_score.weight"][0] @ arrived
        self.p = R[P] * softmax(relation) + (1 - R[P]) * softmax(state)
        return self.p, sum(self.p[s] * sum(R[j] * self.S[s, j] for j in range(P)) for s in range(n))
