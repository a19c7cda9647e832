import keras
import torch

torch.manual_seed(0)
keras.utils.set_random_seed(0)
X = torch.rand(600, 2)
y = (X[:, 0] > X[:, 1]).long()
net = keras.Sequential([keras.layers.Dense(32, activation="relu"), keras.layers.Dense(2)])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
net.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss, metrics=["accuracy"])
net.fit(X[100:], y[100:], validation_data=(X[:100], y[:100]), batch_size=32, epochs=30, verbose=0)
found = torch.as_tensor(net.predict(X[:100], verbose=0)).argmax(1)
accuracy = float((found == y[:100]).float().mean())
