package httpapi

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"raftrv/internal/store"
	"raftrv/internal/store/storetest"
	"raftrv/internal/testkit"
)

func TestHTTP_Backup(t *testing.T) {
	f := newFront(t)
	for i := range 1000 {
		f.put(fmt.Sprint("key-", i), strings.Repeat("v", i))
	}
	a := f.do("GET", "/-/v1/backup", "")
	a.Want(t, 200)
	a.WantHeader(t, "Resource-Version", "1000")
	a.WantHeader(t, "Raft-Index", fmt.Sprint(f.store.Applied()))
	a.WantHeader(t, "Content-Type", "application/octet-stream")
	got := &store.BackupFile{Size: int64(len(a.Body))}
	err := got.Read(strings.NewReader(a.Body))
	testkit.Must(t, err)
	want := f.store.Snapshot()
	storetest.SameItems(t, &got.State, &want)
	if a.Header.Get("Cluster-Id") != got.Cluster || got.Member != 1 || got.Version != "v0" {
		t.Errorf("%+v, header %v", got.BackupHead, a.Header)
	}
	f.do("HEAD", "/-/v1/backup", "").WantHeader(t, "Resource-Version", "1000")
	f.do("GET", "/-/v1/backup?prefix=key", "").Want(t, 400)
	f.do("GET", "/-/v1/backup?resourceVersion=1000", "").Want(t, 200)
	if left := len(f.store.State.Scans); left != 0 {
		t.Errorf("%d scans are left", left)
	}
}

// Who reads slowly gets all of it. Who does not read is cut off.
func TestHTTP_SlowSnapshot(t *testing.T) {
	const most = streamWriteTimeout * 2 * store.FrameSize / streamPaceSize // for one part
	for _, pause := range []time.Duration{most / 2, 2 * most} {
		t.Run(pause.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newPipeFront(t)
				for i := range 50 {
					f.put(fmt.Sprintf("key-%02d", i), strings.Repeat("v", 64<<10))
				}
				c := f.mustDial()
				_, err := io.WriteString(c, "GET /-/v1/backup HTTP/1.1\r\nHost: x\r\n\r\n")
				testkit.Must(t, err)
				res, err := http.ReadResponse(bufio.NewReader(c), nil)
				testkit.Must(t, err)
				digest, part := sha256.New(), make([]byte, 2*store.FrameSize) // a write never waits for two of them
				for err == nil {
					time.Sleep(pause)
					var n int
					n, err = io.ReadFull(res.Body, part)
					digest.Write(part[:n])
				}
				isWhole := res.Trailer.Get("Repr-Digest") == FormatDigest(digest)
				if want := pause < most; isWhole != want {
					t.Errorf("whole: %v; %v, trailer %v", isWhole, err, res.Trailer)
				}
				synctest.Wait()
				if left := len(f.store.State.Scans); left != 0 {
					t.Errorf("%d scans are left", left)
				}
			})
		})
	}
}
