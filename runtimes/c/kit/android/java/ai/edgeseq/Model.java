package ai.edgeseq;

import java.nio.charset.StandardCharsets;

/**
 * An opened model, shared by its sessions. Methods may be called from any thread; close it after its sessions.
 */
public final class Model implements AutoCloseable {
    static {
        System.loadLibrary("edgeseq");
    }

    private long handle;

    private Model(long handle) {
        this.handle = handle;
    }

    /** Maps model.edgeseq and prepares its device, with as many threads as the process may use. */
    public static Model open(String path) {
        return open(path, 0);
    }

    /** threads: of the CPU, the caller counting as one; 0 is all; a model for a GPU has none. */
    public static Model open(String path, int threads) {
        return new Model(open((path + "\0").getBytes(StandardCharsets.UTF_8), threads));
    }

    /** A new stream. */
    public synchronized Session session() {
        return new Session(this, createSession(require()));
    }

    /** Logits per token; 0 for a model without. */
    public synchronized int vocab() {
        return vocab(require());
    }

    /** Longest sequence; 0 is unbounded. */
    public synchronized int context() {
        return context(require());
    }

    /** What the model runs on, in a line. */
    public synchronized String device() {
        return new String(device(require()), StandardCharsets.UTF_8);
    }

    /** Token ids of a text, for models whose tokens are bytes. */
    public synchronized int[] encode(String text) {
        return encode(require(), text.getBytes(StandardCharsets.UTF_8));
    }

    /** Text of token ids, for models whose tokens are bytes; a character cut short becomes a replacement mark. */
    public synchronized String decode(int[] tokens) {
        return new String(decode(require(), tokens), StandardCharsets.UTF_8);
    }

    /** Refused while sessions are open; a second time it does nothing. */
    @Override
    public synchronized void close() {
        if (handle != 0) {
            close(handle);
            handle = 0;
        }
    }

    private long require() {
        if (handle == 0) {
            throw new IllegalStateException("the model is closed");
        }
        return handle;
    }

    private static native long open(byte[] path, int threads);

    private static native void close(long model);

    private static native long createSession(long model);

    private static native int vocab(long model);

    private static native int context(long model);

    private static native byte[] device(long model);

    private static native int[] encode(long model, byte[] text);

    private static native byte[] decode(long model, int[] tokens);
}
