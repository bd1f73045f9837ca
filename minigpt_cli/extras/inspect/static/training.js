// 6. Training; and the start of everything.
function trainingSection() {
  const { curves } = report.training;
  const range = (points) => `from ${fixed(points[0][1], 3)} at step ${points[0][0]} to ${fixed(points.at(-1)[1], 3)} at step ${points.at(-1)[0]}`;
  const { train_loss: train, val_loss: val, lr } = curves;
  if (train.length || val.length) {
    lineChart(byId("losses"), () => ({
      series: [{ points: train, style: "second" }, { points: val, style: "first wide", dots: true }],
      xLabel: "step", yLabel: "loss (nats per token)", height: 300, marks: [{ x: report.model.step, name: "this checkpoint" }],
      describe: [train.length ? `Training loss ${range(train)}.` : "", val.length ? `Validation loss ${range(val)}.` : ""].join(" "),
    }));
  }
  if (lr.length) {
    lineChart(byId("rates"), () => ({ series: [{ points: lr, style: "third" }], xLabel: "step", yLabel: "learning rate", height: 160, zero: true,
      describe: `Learning rate from ${short(lr[0][1])} over ${short(Math.max(...lr.map((p) => p[1])))} to ${short(lr.at(-1)[1])}.` }));
  }
}

textSection();
embeddingSection();
if (layers) {
  const best = report.heads.reduce((a, b) => ((b.importance ? b.importance.rise : 0) > (a.importance ? a.importance.rise : 0) ? b : a));
  Object.assign(state, { layer: best.layer, head: best.head }); // begin where there is most to see
  querySection();
  headSection();
}
streamSection();
if (!report.training.note) trainingSection();
document.documentElement.classList.add("ready");
