package main

import (
	"bytes"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// The level takes effect in a log that is written already, also in its parts.
func TestNode_LogLevelTakesEffect(t *testing.T) {
	var out bytes.Buffer
	logger, level := newLogger(&out, "warn", "json")
	part := logger.Named("part").With(zap.Int("id", 1))
	part.Info("one")
	level.SetLevel(zapcore.DebugLevel)
	part.Debug("two")
	level.SetLevel(zapcore.ErrorLevel)
	part.Warn("three")
	if got := out.String(); !strings.Contains(got, "two") || strings.Contains(got, "one") || strings.Contains(got, "three") {
		t.Errorf("%s", got)
	}
}
