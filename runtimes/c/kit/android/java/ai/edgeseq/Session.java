package ai.edgeseq;

/** One stream of tokens: its state, and the logits after its last token. Calls block until they are done. */
public final class Session implements AutoCloseable {
    private final Model model; // kept alive as long as this
    private final int vocab;
    private long handle;
    private final long[] seed = {0};

    Session(Model model, long handle) {
        this.model = model;
        this.vocab = model.vocab();
        this.handle = handle;
    }

    public Model model() {
        return model;
    }

    /** Consumes tokens, the largest compiled chunks first. */
    public synchronized void prefill(int[] tokens) {
        prefill(require(), tokens);
    }

    /** Consumes one token. */
    public synchronized void step(int token) {
        step(require(), token);
    }

    /** The most likely next token, the first of equals. */
    public synchronized int sample() {
        return sample(require(), 0f, 0, 1f, 0f, seed);
    }

    /** Draws the next token. temperature 0 is greedy; topK 0, topP 1 and minP 0 leave all tokens in. */
    public synchronized int sample(float temperature, int topK, float topP, float minP) {
        return sample(require(), temperature, topK, topP, minP, seed);
    }

    /** The same seed gives the same tokens. */
    public synchronized void seed(long value) {
        seed[0] = value;
    }

    /** Samples greedily and consumes what it sampled, count times. */
    public synchronized int[] generate(int count) {
        return generate(require(), count);
    }

    /** A copy of the logits after the last token; null when nothing was consumed since creation, reset or load. */
    public synchronized float[] logits() {
        return logits(require(), vocab);
    }

    /** Tokens consumed. */
    public synchronized long position() {
        return position(require());
    }

    /** Back to the fresh state. */
    public synchronized void reset() {
        reset(require());
    }

    /** The stream's whole memory: resumes in any session of this model, on any target. */
    public synchronized byte[] save() {
        return save(require());
    }

    /** All or nothing: a refused state leaves the session as it was. */
    public synchronized void load(byte[] state) {
        load(require(), state);
    }

    @Override
    public synchronized void close() {
        if (handle != 0) {
            close(handle);
            handle = 0;
        }
    }

    private long require() {
        if (handle == 0) {
            throw new IllegalStateException("the session is closed");
        }
        return handle;
    }

    private static native void prefill(long session, int[] tokens);

    private static native void step(long session, int token);

    private static native int sample(long session, float temperature, int topK, float topP, float minP, long[] seed);

    private static native int[] generate(long session, int count);

    private static native float[] logits(long session, int vocab);

    private static native long position(long session);

    private static native void reset(long session);

    private static native byte[] save(long session);

    private static native void load(long session, byte[] state);

    private static native void close(long session);
}
